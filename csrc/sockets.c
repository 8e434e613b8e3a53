/* SPDX-License-Identifier: MIT */
#include "sockets.h"

#include <errno.h>

#ifdef __linux__

#include <sys/socket.h>

/* Older C libraries lack these (include/uapi/asm-generic/socket.h, the same on all but a few old machines). */
#ifndef SO_ATTACH_FILTER
#define SO_ATTACH_FILTER 26
#endif
#ifndef SO_DETACH_FILTER
#define SO_DETACH_FILTER 27
#endif
#ifndef SO_ATTACH_REUSEPORT_CBPF
#define SO_ATTACH_REUSEPORT_CBPF 51
#endif
#ifndef SO_ATTACH_REUSEPORT_EBPF
#define SO_ATTACH_REUSEPORT_EBPF 52
#endif
#ifndef SO_MEMINFO
#define SO_MEMINFO 55
#endif

enum {
	RETURN_CONSTANT = 0x06, /* BPF_RET | BPF_K */
	MEMINFO_QUEUED = 0,     /* SK_MEMINFO_RMEM_ALLOC */
	MEMINFO_BUFFER = 1,     /* SK_MEMINFO_RCVBUF */
	MEMINFO_DROPPED = 8,    /* SK_MEMINFO_DROPS */
	MEMINFO_VALUES = 9,
};

/* struct sock_fprog of linux/filter.h */
struct classic_program {
	u16 length;
	const struct qs_classic *instructions;
};

static struct qs_result set(int fd, int option, const void *value, socklen_t size, const char *call)
{
	if (setsockopt(fd, SOL_SOCKET, option, value, size))
		return qs_failed(errno, call);
	return qs_ok(0);
}

struct qs_result qs_close_filter(int fd)
{
	const struct qs_classic nothing = {RETURN_CONSTANT, 0, 0, 0};
	const struct classic_program program = {1, &nothing};

	return set(fd, SO_ATTACH_FILTER, &program, sizeof(program), "setsockopt(SO_ATTACH_FILTER)");
}

struct qs_result qs_open_filter(int fd)
{
	const int unused = 0;

	return set(fd, SO_DETACH_FILTER, &unused, sizeof(unused), "setsockopt(SO_DETACH_FILTER)");
}

struct qs_result qs_attach_classic(int fd, const struct qs_classic *instructions, u32 length)
{
	const struct classic_program program = {(u16)length, instructions};

	return set(fd, SO_ATTACH_REUSEPORT_CBPF, &program, sizeof(program), "setsockopt(SO_ATTACH_REUSEPORT_CBPF)");
}

struct qs_result qs_attach_program(int fd, int program)
{
	return set(fd, SO_ATTACH_REUSEPORT_EBPF, &program, sizeof(program), "setsockopt(SO_ATTACH_REUSEPORT_EBPF)");
}

struct qs_result qs_read_meminfo(int fd, struct qs_meminfo *info)
{
	u32 values[MEMINFO_VALUES] = {0};
	socklen_t size = sizeof(values);

	if (getsockopt(fd, SOL_SOCKET, SO_MEMINFO, values, &size))
		return qs_failed(errno, "getsockopt(SO_MEMINFO)");
	info->queued = values[MEMINFO_QUEUED];
	info->buffer = values[MEMINFO_BUFFER];
	info->dropped = values[MEMINFO_DROPPED];
	return qs_ok(0);
}

#else

struct qs_result qs_close_filter(int fd)
{
	(void)fd;
	return qs_failed(ENOSYS, "setsockopt(SO_ATTACH_FILTER)");
}

struct qs_result qs_open_filter(int fd)
{
	(void)fd;
	return qs_failed(ENOSYS, "setsockopt(SO_DETACH_FILTER)");
}

struct qs_result qs_attach_classic(int fd, const struct qs_classic *instructions, u32 length)
{
	(void)fd, (void)instructions, (void)length;
	return qs_failed(ENOSYS, "setsockopt(SO_ATTACH_REUSEPORT_CBPF)");
}

struct qs_result qs_attach_program(int fd, int program)
{
	(void)fd, (void)program;
	return qs_failed(ENOSYS, "setsockopt(SO_ATTACH_REUSEPORT_EBPF)");
}

struct qs_result qs_read_meminfo(int fd, struct qs_meminfo *info)
{
	(void)fd, (void)info;
	return qs_failed(ENOSYS, "getsockopt(SO_MEMINFO)");
}

#endif
