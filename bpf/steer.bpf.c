/* SPDX-License-Identifier: MIT */
/*
 * Chooses the socket of a reuseport group for one UDP datagram (BPF_PROG_TYPE_SK_REUSEPORT).
 *
 * The decision is csrc/decide.h; this file fetches the bytes, selects the socket and counts. Each run selects a socket
 * and returns SK_PASS: without a selection the kernel would hash over all members, parked ones too, and SK_DROP
 * answers the sender with an ICMP port unreachable.
 *
 * It loads with CAP_BPF alone: constant offsets into the packet and the stack, no long loops.
 */
#include <linux/bpf.h>
#include <bpf/bpf_helpers.h>

#include "decide.h"

#define UDP_HEADER_LENGTH 8 /* the program sees the UDP header before the payload */

/*
 * Written before loading and frozen, so the verifier knows its values and drops the branches they exclude. Volatile:
 * the compiler must not know them. Each is read where it is used and never copied: loaded without CAP_PERFMON, a
 * program gets a speculation barrier behind each first write to a word of the stack.
 */
const volatile struct qs_config config = {
	.cid_length = QS_CID_LENGTH_DEFAULT,
	.listeners = 1,
	.slots = 1,
};

/* The sockets by slot, the sink last. 8-byte values let user space look an entry up. */
struct {
	__uint(type, BPF_MAP_TYPE_REUSEPORT_SOCKARRAY);
	__uint(max_entries, 2);
	__type(key, u32);
	__type(value, u64);
} sockets SEC(".maps");

/* The dispatch table: which listener slot takes new connections with a given hash. */
struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(map_flags, BPF_F_MMAPABLE);
	__uint(max_entries, QS_TABLE_SIZE);
	__type(key, u32);
	__type(value, u32);
} table SEC(".maps");

struct counts {
	u64 by_outcome[QS_OUTCOMES];
};

/* Datagrams by slot and outcome, the sink last. */
struct {
	__uint(type, BPF_MAP_TYPE_PERCPU_ARRAY);
	__uint(max_entries, 2);
	__type(key, u32);
	__type(value, struct counts);
} counters SEC(".maps");

QS_INLINE u32 listener(u64 hash)
{
	u32 index = qs_table_index(hash);
	u32 *slot = bpf_map_lookup_elem(&table, &index);

	return slot ? *slot : 0;
}

QS_INLINE u32 choose(const struct sk_reuseport_md *md, const struct qs_decision *decision)
{
	if (decision->outcome == QS_ROUTED)
		return decision->slot;
	if (decision->outcome != QS_DISPATCHED && config.drop_invalid)
		return config.slots;
	if (decision->outcome == QS_MALFORMED)
		return listener((u64)md->hash << 32);
	return listener(decision->hash);
}

QS_INLINE void count(const u32 *slot, u32 outcome)
{
	struct counts *counts = bpf_map_lookup_elem(&counters, slot);

	if (!counts)
		return;
	if (outcome == QS_ROUTED)
		counts->by_outcome[QS_ROUTED]++;
	else if (outcome == QS_DISPATCHED)
		counts->by_outcome[QS_DISPATCHED]++;
	else if (outcome == QS_UNROUTABLE)
		counts->by_outcome[QS_UNROUTABLE]++;
	else
		counts->by_outcome[QS_MALFORMED]++;
}

SEC("sk_reuseport")
int steer(struct sk_reuseport_md *md)
{
	const u8 *payload = (const u8 *)md->data + UDP_HEADER_LENGTH;
	const u8 *end = md->data_end;
	const u32 length = md->len - UDP_HEADER_LENGTH;
	struct qs_decision decision;
	u32 slot;

	if (payload + QS_HEAD_LENGTH <= end) {
		decision = qs_decide(&config, payload, length);
	} else {
		/* A short datagram, or one whose payload is in pages or fragments (GSO trains, large datagrams). */
		u8 copy[QS_HEAD_LENGTH] = {0};
		u32 last = length - 1;

		if (length) {
			asm volatile("" : "+r"(last));
			if (last > QS_HEAD_LENGTH - 1)
				last = QS_HEAD_LENGTH - 1;
			bpf_skb_load_bytes(md, UDP_HEADER_LENGTH, copy, last + 1);
		}
		decision = qs_decide(&config, copy, length);
	}

	slot = choose(md, &decision);
	count(&slot, decision.outcome);
	if (bpf_sk_select_reuseport(md, &sockets, &slot, 0)) {
		/* Only while the group opens: its first member is there before the map is filled. */
		slot = 0;
		bpf_sk_select_reuseport(md, &sockets, &slot, 0);
	}
	return SK_PASS;
}

char _license[] SEC("license") = "MIT";
