/* SPDX-License-Identifier: MIT */
#define _GNU_SOURCE /* syscall */
#include "trace.h"

#include <errno.h>

#ifdef __linux__

#include <stdint.h>
#include <sys/syscall.h>
#include <unistd.h>

/* Commands and types of bpf(2), include/uapi/linux/bpf.h. */
enum {
	MAP_CREATE = 0,
	MAP_LOOKUP = 1,
	PROGRAM_LOAD = 5,
	RAW_TRACEPOINT_OPEN = 17,
	TYPE_ARRAY = 2,
	TYPE_RAW_TRACEPOINT = 17,
};

static u64 address(const void *pointer)
{
	return (u64)(uintptr_t)pointer;
}

static struct qs_result bpf(int command, const void *attributes, u32 size, const char *call)
{
	long value = syscall(__NR_bpf, command, attributes, size);

	return value < 0 ? qs_failed(errno, call) : qs_ok((int)value);
}

struct qs_result qs_make_counts(u32 entries)
{
	const struct {
		u32 type, key_size, value_size, entries, flags;
	} attributes = {TYPE_ARRAY, sizeof(u32), sizeof(u64), entries, 0};

	return bpf(MAP_CREATE, &attributes, sizeof(attributes), "bpf(BPF_MAP_CREATE)");
}

struct qs_result qs_load_tracing(const void *instructions, u32 count)
{
	/* The kernel lets only programs under a license that it takes for free read its memory. */
	const struct {
		u32 type, count;
		u64 instructions, license;
	} attributes = {TYPE_RAW_TRACEPOINT, count, address(instructions), address("Dual MIT/GPL")};

	return bpf(PROGRAM_LOAD, &attributes, sizeof(attributes), "bpf(BPF_PROG_LOAD)");
}

struct qs_result qs_open_tracepoint(int program, const char *name)
{
	const struct {
		u64 name;
		u32 program, padding;
	} attributes = {address(name), (u32)program, 0};

	return bpf(RAW_TRACEPOINT_OPEN, &attributes, sizeof(attributes), "bpf(BPF_RAW_TRACEPOINT_OPEN)");
}

struct qs_result qs_read_count(int counts, u32 key, u64 *count)
{
	const struct {
		u32 map, padding;
		u64 key, value, flags;
	} attributes = {(u32)counts, 0, address(&key), address(count), 0};

	return bpf(MAP_LOOKUP, &attributes, sizeof(attributes), "bpf(BPF_MAP_LOOKUP_ELEM)");
}

#else

struct qs_result qs_make_counts(u32 entries)
{
	(void)entries;
	return qs_failed(ENOSYS, "bpf(BPF_MAP_CREATE)");
}

struct qs_result qs_load_tracing(const void *instructions, u32 count)
{
	(void)instructions, (void)count;
	return qs_failed(ENOSYS, "bpf(BPF_PROG_LOAD)");
}

struct qs_result qs_open_tracepoint(int program, const char *name)
{
	(void)program, (void)name;
	return qs_failed(ENOSYS, "bpf(BPF_RAW_TRACEPOINT_OPEN)");
}

struct qs_result qs_read_count(int counts, u32 key, u64 *count)
{
	(void)counts, (void)key, (void)count;
	return qs_failed(ENOSYS, "bpf(BPF_MAP_LOOKUP_ELEM)");
}

#endif
