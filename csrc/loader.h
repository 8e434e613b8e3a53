/* SPDX-License-Identifier: MIT */
/*
 * Brings the eBPF program of program.h into the kernel over bpf(2), without libbpf: it makes the maps, puts their
 * descriptors into the instructions and loads. A test holds it against libbpf: same program tag, same maps.
 */
#ifndef QS_LOADER_H
#define QS_LOADER_H

#include "decide.h"
#include "result.h"

/* struct bpf_insn of linux/bpf.h */
struct qs_instruction {
	u8 opcode, registers;
	int16_t offset;
	int32_t immediate;
};

struct qs_map_shape {
	char name[16];
	u32 type, key_size, value_size, entries, flags;
};

struct qs_relocation {
	u32 instruction, map;
};

/* Descriptors of a loaded program, all close-on-exec. The program keeps the maps alive, a group its program. */
struct qs_program {
	int program, sockets, table, counters;
};

/*
 * Make the maps of a group and load the program. On failure nothing is left open, and `log` holds the end of what the
 * verifier said, if it was the verifier.
 */
struct qs_result qs_load_program(const struct qs_config *config, struct qs_program *program, char *log, u32 log_size);

struct qs_result qs_set_socket(int sockets, u32 slot, int fd);
struct qs_result qs_set_listener(int table, u32 index, u32 slot);

/* Read one slot's datagrams by outcome, summed over the CPUs. */
struct qs_result qs_read_counters(int counters, u32 slot, u64 sums[QS_OUTCOMES]);

/* How bpf(2) answers here; each field is an errno, 0 for success. */
struct qs_bpf_answers {
	int bad_pointer;  /* an unknown command with a bad pointer: EFAULT when the call gets through */
	int bad_command;  /* an unknown command with zeros: EINVAL when the call gets through */
	int array;        /* making an array map */
	int socket_array; /* making a REUSEPORT_SOCKARRAY */
	int program;      /* loading the steering program */
	int signal;       /* the signal that ended the child, or 0 */
};

/*
 * Try bpf(2) in a child process, since a seccomp filter may answer it by killing the caller. The child raises no
 * SIGCHLD and is not seen by wait() elsewhere in the process.
 */
struct qs_result qs_probe_bpf(struct qs_bpf_answers *answers);

#endif
