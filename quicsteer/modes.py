"""How datagrams reach their worker on this host."""

import enum


class SteeringMode(enum.StrEnum):
    """The modes in order of preference; ``mode="auto"`` takes the first that works."""

    EBPF = "ebpf"
    """An eBPF program: steering by connection ID, counters by outcome. Needs CAP_BPF when the group opens."""

    CBPF = "cbpf"
    """The same decision as a classic BPF program: no privilege, no counters by outcome."""

    HASH = "hash"
    """The kernel's hash of addresses and ports: a connection breaks when an address changes."""

    SINGLE = "single"
    """One socket, one worker."""

    @property
    def steers(self) -> bool:
        """Whether datagrams go by connection ID."""
        return self in (SteeringMode.EBPF, SteeringMode.CBPF)
