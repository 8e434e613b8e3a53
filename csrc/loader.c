/* SPDX-License-Identifier: MIT */
#define _GNU_SOURCE /* pipe2 */
#include "loader.h"

#include <errno.h>

#ifdef __linux__

#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <unistd.h>

#include "program.h"

#ifndef __NR_bpf
#error "this C library is older than bpf(2): build with newer kernel headers"
#endif
#ifndef __WALL
#define __WALL 0x40000000
#endif

/* Commands and types of bpf(2), include/uapi/linux/bpf.h. */
enum {
	MAP_CREATE = 0,
	MAP_LOOKUP = 1,
	MAP_UPDATE = 2,
	PROGRAM_LOAD = 5,
	MAP_FREEZE = 22,
	NO_COMMAND = 9999,
	TYPE_ARRAY = 2,
	TYPE_SK_REUSEPORT = 21,
	LOG_LEVEL = 1,
	LOG_BYTES = 1 << 20,
	CPUS_MAX = 8192, /* CONFIG_NR_CPUS of the largest kernels */
	INSTRUCTIONS = sizeof(qs_instructions) / sizeof(qs_instructions[0]),
	RELOCATIONS = sizeof(qs_relocations) / sizeof(qs_relocations[0]),
};

/* The parts of union bpf_attr that are used here. */
struct map_create {
	u32 type, key_size, value_size, entries, flags, inner_map, numa_node;
	char name[16];
};

struct map_element {
	u32 map, padding;
	u64 key, value, flags;
};

struct program_load {
	u32 type, instruction_count;
	u64 instructions, license;
	u32 log_level, log_size;
	u64 log;
	u32 kernel_version, flags;
	char name[16];
	u32 interface_index, attach_type;
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

static struct qs_result make_map(const struct qs_map_shape *shape, u32 entries)
{
	struct map_create attributes = {
		.type = shape->type,
		.key_size = shape->key_size,
		.value_size = shape->value_size,
		.entries = entries,
		.flags = shape->flags,
	};

	memcpy(attributes.name, shape->name, sizeof(attributes.name));
	return bpf(MAP_CREATE, &attributes, sizeof(attributes), "bpf(BPF_MAP_CREATE)");
}

static struct qs_result set_element(int map, u32 key, const void *value)
{
	const struct map_element attributes = {.map = (u32)map, .key = address(&key), .value = address(value)};

	return bpf(MAP_UPDATE, &attributes, sizeof(attributes), "bpf(BPF_MAP_UPDATE_ELEM)");
}

static struct qs_result freeze(int map)
{
	const u32 attributes = (u32)map;

	return bpf(MAP_FREEZE, &attributes, sizeof(attributes), "bpf(BPF_MAP_FREEZE)");
}

static struct qs_result load(const int maps[QS_MAPS], char *log, u32 log_size)
{
	struct qs_instruction instructions[INSTRUCTIONS];
	struct program_load attributes = {
		.type = TYPE_SK_REUSEPORT,
		.instruction_count = INSTRUCTIONS,
		.instructions = address(instructions),
		.license = address("MIT"),
		.log_level = log ? LOG_LEVEL : 0,
		.log_size = log_size,
		.log = address(log),
		.name = "quicsteer",
	};

	memcpy(instructions, qs_instructions, sizeof(instructions));
	for (u32 i = 0; i < RELOCATIONS; i++)
		instructions[qs_relocations[i].instruction].immediate = maps[qs_relocations[i].map];
	return bpf(PROGRAM_LOAD, &attributes, sizeof(attributes), "bpf(BPF_PROG_LOAD)");
}

/* Load again to learn what the verifier says; keeps the end of it, where the reason stands. */
static void explain(const int maps[QS_MAPS], char *log, u32 log_size)
{
	char *whole = calloc(1, LOG_BYTES);
	struct qs_result again;
	size_t length;

	log[0] = 0;
	if (!whole)
		return;
	again = load(maps, whole, LOG_BYTES);
	if (again.value >= 0)
		close(again.value);
	length = strnlen(whole, LOG_BYTES - 1);
	snprintf(log, log_size, "%s", length < log_size ? whole : whole + length - (log_size - 1));
	free(whole);
}

static void close_maps(int maps[QS_MAPS])
{
	for (int i = 0; i < QS_MAPS; i++)
		if (maps[i] >= 0)
			close(maps[i]);
}

static struct qs_result make_maps(const struct qs_config *config, int maps[QS_MAPS])
{
	struct qs_result result;

	for (int i = 0; i < QS_MAPS; i++)
		maps[i] = -1;
	for (int i = 0; i < QS_MAPS; i++) {
		const int by_slot = i == QS_MAP_SOCKETS || i == QS_MAP_COUNTERS;

		result = make_map(&qs_map_shapes[i], by_slot ? config->slots + 1 : qs_map_shapes[i].entries);
		if (result.error)
			return result;
		maps[i] = result.value;
	}
	for (u32 i = 0; i < QS_TABLE_SIZE; i++) {
		result = qs_set_listener(maps[QS_MAP_TABLE], i, i % config->listeners);
		if (result.error)
			return result;
	}
	result = set_element(maps[QS_MAP_CONFIG], 0, config);
	if (result.error)
		return result;
	return freeze(maps[QS_MAP_CONFIG]);
}

struct qs_result qs_load_program(const struct qs_config *config, struct qs_program *program, char *log, u32 log_size)
{
	int maps[QS_MAPS];
	struct qs_result result;

	log[0] = 0;
	if (!config->listeners)
		return qs_failed(EINVAL, "qs_load_program");
	result = make_maps(config, maps);
	if (!result.error) {
		result = load(maps, NULL, 0);
		if (result.error == EACCES || result.error == EINVAL)
			explain(maps, log, log_size);
	}
	if (result.error) {
		close_maps(maps);
		return result;
	}
	close(maps[QS_MAP_CONFIG]);
	*program = (struct qs_program){
		.program = result.value,
		.sockets = maps[QS_MAP_SOCKETS],
		.table = maps[QS_MAP_TABLE],
		.counters = maps[QS_MAP_COUNTERS],
	};
	return result;
}

struct qs_result qs_set_socket(int sockets, u32 slot, int fd)
{
	const u64 value = (u64)fd;

	return set_element(sockets, slot, &value);
}

struct qs_result qs_set_listener(int table, u32 index, u32 slot)
{
	return set_element(table, index, &slot);
}

/* The number of CPUs that this kernel may ever have: a per-CPU look-up writes that many values. */
static int possible_cpus(void)
{
	static int cpus;
	int first, last, fields;
	FILE *file;

	if (cpus)
		return cpus;
	file = fopen("/sys/devices/system/cpu/possible", "re");
	if (!file)
		return -1;
	fields = fscanf(file, "%d-%d", &first, &last); /* "0" or "0-N" */
	fclose(file);
	if (fields < 1 || first != 0 || (fields == 2 && (last < 0 || last >= CPUS_MAX)))
		return -1;
	cpus = fields == 2 ? last + 1 : 1;
	return cpus;
}

struct qs_result qs_read_counters(int counters, u32 slot, u64 sums[QS_OUTCOMES])
{
	const int cpus = possible_cpus();
	struct map_element attributes = {.map = (u32)counters, .key = address(&slot)};
	struct qs_result result;
	u64(*values)[QS_OUTCOMES];

	if (cpus < 0)
		return qs_failed(EINVAL, "read(/sys/devices/system/cpu/possible)");
	values = calloc((size_t)cpus, sizeof(*values));
	if (!values)
		return qs_failed(ENOMEM, "calloc");
	attributes.value = address(values);
	result = bpf(MAP_LOOKUP, &attributes, sizeof(attributes), "bpf(BPF_MAP_LOOKUP_ELEM)");
	memset(sums, 0, QS_OUTCOMES * sizeof(*sums));
	for (int cpu = 0; !result.error && cpu < cpus; cpu++)
		for (int outcome = 0; outcome < QS_OUTCOMES; outcome++)
			sums[outcome] += values[cpu][outcome];
	free(values);
	return result;
}

/* Runs in the child of qs_probe_bpf: system calls only, on memory that the parent does not share. */
static void answer(int pipe_end)
{
	static const u64 zeros[19];
	const struct qs_config config = {.cid_length = QS_CID_LENGTH_DEFAULT, .listeners = 1, .slots = 1};
	struct qs_bpf_answers answers = {0};
	const struct qs_map_shape array = {"probe", TYPE_ARRAY, 4, 4, 1, 0};
	int maps[QS_MAPS];

	answers.bad_pointer = bpf(NO_COMMAND, (void *)1, 64, "").error;
	answers.bad_command = bpf(NO_COMMAND, zeros, sizeof(zeros), "").error;
	answers.array = make_map(&array, 1).error;
	answers.socket_array = make_map(&qs_map_shapes[QS_MAP_SOCKETS], 1).error;
	answers.program = make_maps(&config, maps).error;
	if (!answers.program)
		answers.program = load(maps, NULL, 0).error;
	if (write(pipe_end, &answers, sizeof(answers)) != sizeof(answers))
		_exit(1);
	_exit(0);
}

struct qs_result qs_probe_bpf(struct qs_bpf_answers *answers)
{
	int ends[2], status = 0;
	ssize_t length;
	long child;

	memset(answers, 0, sizeof(*answers));
	if (pipe2(ends, O_CLOEXEC))
		return qs_failed(errno, "pipe2");
	/* A fork whose end raises no signal, so that nobody else in this process waits for it. */
	child = syscall(SYS_clone, 0, 0, 0, 0, 0);
	if (child < 0) {
		const int error = errno;

		close(ends[0]);
		close(ends[1]);
		return qs_failed(error, "clone");
	}
	if (child == 0)
		answer(ends[1]);
	close(ends[1]);
	do
		length = read(ends[0], answers, sizeof(*answers));
	while (length < 0 && errno == EINTR);
	close(ends[0]);
	while (waitpid((pid_t)child, &status, __WALL) < 0 && errno == EINTR)
		;
	if (length == (ssize_t)sizeof(*answers))
		return qs_ok(0);
	memset(answers, 0, sizeof(*answers));
	if (!WIFSIGNALED(status))
		return qs_failed(EPIPE, "read(probe)");
	answers->signal = WTERMSIG(status);
	return qs_ok(0);
}

#else

struct qs_result qs_load_program(const struct qs_config *config, struct qs_program *program, char *log, u32 log_size)
{
	(void)config, (void)program, (void)log_size;
	log[0] = 0;
	return qs_failed(ENOSYS, "bpf(BPF_MAP_CREATE)");
}

struct qs_result qs_set_socket(int sockets, u32 slot, int fd)
{
	(void)sockets, (void)slot, (void)fd;
	return qs_failed(ENOSYS, "bpf(BPF_MAP_UPDATE_ELEM)");
}

struct qs_result qs_set_listener(int table, u32 index, u32 slot)
{
	(void)table, (void)index, (void)slot;
	return qs_failed(ENOSYS, "bpf(BPF_MAP_UPDATE_ELEM)");
}

struct qs_result qs_read_counters(int counters, u32 slot, u64 sums[QS_OUTCOMES])
{
	(void)counters, (void)slot, (void)sums;
	return qs_failed(ENOSYS, "bpf(BPF_MAP_LOOKUP_ELEM)");
}

struct qs_result qs_probe_bpf(struct qs_bpf_answers *answers)
{
	*answers = (struct qs_bpf_answers){.bad_pointer = ENOSYS, .bad_command = ENOSYS};
	return qs_ok(0);
}

#endif
