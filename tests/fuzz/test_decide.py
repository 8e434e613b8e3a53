"""The decision on arbitrary bytes: under sanitizers, in the kernel against the native build, and by real groups."""

import json
import random
import secrets
import socket
import subprocess
import sysconfig
import time
from pathlib import Path

import pytest
from endurance import seconds
from hostile import arbitrary
from trial import Trial, open_group

from quicsteer import SteeringMode
from quicsteer.abi import CID_LENGTH_MAX, CID_LENGTH_MIN, KEY_LENGTH, Outcome
from quicsteer.decision import Rules

ROOT = Path(__file__).parents[2]
HERE = Path(__file__).parent
CLANG = "clang-19"
INCLUDES = [f"-I{ROOT / 'csrc'}", f"-I{ROOT / 'bpf'}"]
WARNINGS = ["-std=gnu11", "-Wall", "-Wextra", "-Werror"]
SANITIZERS = ["-fsanitize=fuzzer,address,undefined", "-fno-sanitize-recover=all"]
MULTIARCH = sysconfig.get_config_var("MULTIARCH") or "x86_64-linux-gnu"

FUZZER_SECONDS = seconds("FUZZ", 60)
KERNEL_SECONDS = FUZZER_SECONDS / 2
GROUP_SECONDS = FUZZER_SECONDS / 10
LONGEST_INPUT = 400
SPARE_TIME = 60


def build(*command: str | Path) -> None:
    subprocess.run([str(part) for part in command], check=True)


@pytest.mark.timeout(FUZZER_SECONDS + SPARE_TIME)
def test_no_datagram_reads_past_the_head_or_breaks_a_promise(tmp_path: Path) -> None:
    fuzzer, corpus = tmp_path / "fuzzer", tmp_path / "found"
    corpus.mkdir()
    build(CLANG, *WARNINGS, "-O1", "-g", *SANITIZERS, *INCLUDES, HERE / "decide_fuzzer.c", "-o", fuzzer)
    options = [f"-max_total_time={FUZZER_SECONDS:.0f}", f"-max_len={LONGEST_INPUT}", f"-artifact_prefix={tmp_path}/"]
    done = subprocess.run(
        [fuzzer, *options, "-print_final_stats=1", corpus, HERE / "corpus"], capture_output=True, text=True, check=False
    )
    inputs = [f"{path.name} {path.read_bytes().hex()}" for path in tmp_path.glob("*-*")]
    assert done.returncode == 0, f"{done.stderr[-5000:]}\n{inputs}"
    print(*(line for line in done.stderr.splitlines() if "number_of_executed_units" in line))


def test_every_input_of_the_corpus_holds(tmp_path: Path) -> None:
    """Those that are committed, whatever the time: each was interesting once."""
    fuzzer = tmp_path / "fuzzer"
    build(CLANG, *WARNINGS, "-O1", "-g", *SANITIZERS, *INCLUDES, HERE / "decide_fuzzer.c", "-o", fuzzer)
    inputs = sorted((HERE / "corpus").iterdir())
    done = subprocess.run([fuzzer, *inputs], capture_output=True, text=True, check=False, cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-5000:]
    assert len(inputs) > 30


@pytest.mark.timeout(KERNEL_SECONDS + SPARE_TIME)
def test_the_kernel_decides_as_the_native_build(ebpf: SteeringMode, tmp_path: Path) -> None:
    program, driver = tmp_path / "decide.bpf.o", tmp_path / "differential"
    flags = ["-O2", "-g", "-Wall", "-Wextra", "-Werror", "--target=bpf", "-mcpu=v3", f"-I/usr/include/{MULTIARCH}"]
    build(CLANG, *flags, *INCLUDES, "-c", HERE / "decide.bpf.c", "-o", program)
    build("cc", *WARNINGS, "-O2", *INCLUDES, HERE / "differential.c", "-lbpf", "-o", driver)
    seed = secrets.randbits(63)
    done = subprocess.run(
        [driver, program, str(KERNEL_SECONDS), str(seed)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, f"seed {seed}\n{done.stdout}{done.stderr}"
    figures = json.loads(done.stdout)
    assert min(figures["outcomes"]) > figures["runs"] / 20, "every outcome is tried often"
    print(f"seed {seed}", figures, f"{figures['runs'] / figures['seconds']:.0f} runs/s")


def random_rules(source: random.Random) -> Rules:
    listeners = source.choice((1, 2, 3, 5, 16))
    return Rules(
        source.randbytes(KEY_LENGTH),
        source.randint(CID_LENGTH_MIN, CID_LENGTH_MAX),
        listeners,
        listeners * source.randint(2, 4),
        source.random() < 0.5,
    )


@pytest.mark.timeout(GROUP_SECONDS + SPARE_TIME)
def test_a_real_group_decides_as_the_model(steering_mode: SteeringMode) -> None:
    seed = secrets.randbits(63)
    source = random.Random(seed)
    print(f"seed {seed}")
    end = time.monotonic() + GROUP_SECONDS
    sent = 0
    while time.monotonic() < end:
        rules = random_rules(source)
        with (
            open_group("127.0.0.1:0", rules, steering_mode) as (group, sockets),
            socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as client,
        ):
            client.connect(group.addresses[0])
            trial = Trial(group, rules, sockets)
            trial.send(client, [arbitrary(rules, source) for _ in range(2000)])
            trial.verify()
            assert len(trial.outcomes) == len(Outcome)
            sent += trial.sent
    print(f"{sent} datagrams, {sent / GROUP_SECONDS:.0f}/s")
