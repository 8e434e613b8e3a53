/* SPDX-License-Identifier: MIT */
/* The socket options that Python's socket module cannot set: filters, programs, SO_MEMINFO. */
#ifndef QS_SOCKETS_H
#define QS_SOCKETS_H

#include "result.h"
#include "types.h"

/* One classic BPF instruction, as struct sock_filter of linux/filter.h. */
struct qs_classic {
	u16 code;
	u8 jump_true, jump_false;
	u32 k;
};

/* What SO_MEMINFO tells of a socket (include/uapi/linux/sock_diag.h). */
struct qs_meminfo {
	u32 queued;  /* bytes of memory that queued datagrams take (SK_MEMINFO_RMEM_ALLOC) */
	u32 buffer;  /* receive buffer in bytes (SK_MEMINFO_RCVBUF) */
	u32 dropped; /* datagrams dropped since the socket was made (SK_MEMINFO_DROPS), modulo 2^32 */
};

/* Let a socket swallow and count every datagram. Datagrams that are queued already stay. */
struct qs_result qs_close_filter(int fd);

/* Take that filter off again. */
struct qs_result qs_open_filter(int fd);

/*
 * Attach a steering program to the reuseport group of a socket: once, before the socket is bound. Replacing a classic
 * program of a live group crashes kernels without the fix for CVE-2026-52910.
 */
struct qs_result qs_attach_classic(int fd, const struct qs_classic *program, u32 length);
struct qs_result qs_attach_program(int fd, int program);

struct qs_result qs_read_meminfo(int fd, struct qs_meminfo *info);

#endif
