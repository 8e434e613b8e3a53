/* SPDX-License-Identifier: MIT */
/* Starts a worker process that takes over sockets by the LISTEN_FDS convention (sd_listen_fds(3)). */
#ifndef QS_SPAWN_H
#define QS_SPAWN_H

#include <sys/types.h>

#include "result.h"
#include "types.h"

#define QS_FIRST_FD 3                 /* SD_LISTEN_FDS_START */
#define QS_SIGNALS 64                 /* bits of a set of signals; signal 64 is not among them */
#define QS_KEEP_ID ((unsigned int)-1) /* leave the uid or gid as it is */

struct qs_spawn {
	const char *path;         /* what to execute */
	char *const *arguments;   /* NULL-terminated */
	char *const *environment; /* NULL-terminated; an entry "LISTEN_PID=" is filled in with the child's pid */
	const int *descriptors;   /* become 3, 4, ... in the child, without close-on-exec */
	u32 descriptor_count;
	unsigned int uid, gid; /* or QS_KEEP_ID */
	u64 ignored;           /* signals that the program shall find ignored: bit 1 is signal 1 */
};

/*
 * Fork and execute. The child leaves its ambient capabilities behind, and with another uid all capabilities.
 *
 * Returns the pid once the program runs; an error, with the name of the call that failed in the child, when it does
 * not. Nothing is left behind then.
 */
struct qs_result qs_spawn(const struct qs_spawn *spawn);

#endif
