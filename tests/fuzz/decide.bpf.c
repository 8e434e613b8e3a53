/* SPDX-License-Identifier: MIT */
/*
 * The decision (csrc/decide.h) in the kernel, to be run by BPF_PROG_TEST_RUN, which the steering program's own type
 * does not support. It reads a datagram in the two ways that bpf/steer.bpf.c does.
 */
#include <linux/bpf.h>
#include <bpf/bpf_helpers.h>

#include "decide.h"

#define ETHERNET_HEADER_LENGTH 14

struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(map_flags, BPF_F_MMAPABLE);
	__uint(max_entries, 1);
	__type(key, u32);
	__type(value, struct qs_config);
} config SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(map_flags, BPF_F_MMAPABLE);
	__uint(max_entries, 1);
	__type(key, u32);
	__type(value, struct qs_decision);
} decision SEC(".maps");

QS_INLINE int decide(const u8 *head, u32 length)
{
	const u32 first = 0;
	const struct qs_config *rules = bpf_map_lookup_elem(&config, &first);
	struct qs_decision *result = bpf_map_lookup_elem(&decision, &first);

	if (!rules || !result)
		return 0;
	*result = qs_decide(rules, head, length);
	return 1;
}

/* Copied, as from datagrams in pages or fragments. The kernel has taken the Ethernet header off. */
SEC("socket")
int copied(struct __sk_buff *skb)
{
	const u32 length = skb->len;
	u8 head[QS_HEAD_LENGTH] = {0};
	u32 last = length - 1;

	if (length) {
		asm volatile("" : "+r"(last));
		if (last > QS_HEAD_LENGTH - 1)
			last = QS_HEAD_LENGTH - 1;
		bpf_skb_load_bytes(skb, 0, head, last + 1);
	}
	return decide(head, length);
}

/* In place, as from most datagrams. */
SEC("tc")
int in_place(struct __sk_buff *skb)
{
	const u8 *payload = (const u8 *)(long)skb->data + ETHERNET_HEADER_LENGTH;
	const u8 *end = (const u8 *)(long)skb->data_end;

	if (payload + QS_HEAD_LENGTH > end)
		return 0;
	return decide(payload, skb->len - ETHERNET_HEADER_LENGTH);
}

char _license[] SEC("license") = "MIT";
