/* SPDX-License-Identifier: MIT */
/*
 * A program on a raw tracepoint that counts into an array, over bpf(2): why datagrams are dropped. It needs CAP_BPF and
 * CAP_PERFMON. All descriptors are close-on-exec; the program ends with the last of them.
 */
#ifndef QS_TRACE_H
#define QS_TRACE_H

#include "result.h"
#include "types.h"

/* Make an array of 64-bit counts. */
struct qs_result qs_make_counts(u32 entries);

/* Load a program for raw tracepoints: `count` instructions, as struct bpf_insn of linux/bpf.h. */
struct qs_result qs_load_tracing(const void *instructions, u32 count);

/* Let a program run at a tracepoint for as long as the returned descriptor is open. */
struct qs_result qs_open_tracepoint(int program, const char *name);

struct qs_result qs_read_count(int counts, u32 key, u64 *count);

#endif
