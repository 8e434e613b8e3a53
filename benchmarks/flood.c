/* SPDX-License-Identifier: MIT */
/*
 * Sends one datagram over and over, as fast as one thread can, each time with a fresh random connection ID.
 *
 * The caller runs it in a process of its own and shares `struct flood` with it: `sent` can be read meanwhile, and
 * `stop` ends it before its time.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <stdatomic.h>
#include <stdint.h>
#include <string.h>
#include <sys/socket.h>
#include <time.h>

enum {
	BATCH = 64,
	DATAGRAM_MAX = 2048,
};

struct flood {
	const int32_t *sockets; /* connected, blocking; they take turns, a batch each */
	const uint8_t *datagram;
	uint64_t seed;
	_Atomic uint64_t sent;
	_Atomic uint32_t stop;
	uint32_t socket_count; /* 0: be as busy, and send nothing */
	uint32_t datagram_size;
	uint32_t cid_offset;   /* where 8 bytes are made anew for each datagram */
	uint32_t milliseconds; /* how long at most */
};

struct outgoing {
	struct mmsghdr messages[BATCH];
	struct iovec parts[BATCH];
	uint8_t bytes[BATCH][DATAGRAM_MAX];
};

static uint64_t now_ms(void)
{
	struct timespec time;

	clock_gettime(CLOCK_MONOTONIC, &time);
	return (uint64_t)time.tv_sec * 1000 + (uint64_t)time.tv_nsec / 1000000;
}

/* The next number of splitmix64, which any seed serves. */
static uint64_t next_random(uint64_t *state)
{
	uint64_t z = *state += 0x9e3779b97f4a7c15;

	z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9;
	z = (z ^ (z >> 27)) * 0x94d049bb133111eb;
	return z ^ (z >> 31);
}

static void prepare(struct outgoing *out, const struct flood *flood)
{
	memset(out, 0, sizeof(*out));
	for (int i = 0; i < BATCH; i++) {
		memcpy(out->bytes[i], flood->datagram, flood->datagram_size);
		out->parts[i] = (struct iovec){out->bytes[i], flood->datagram_size};
		out->messages[i].msg_hdr.msg_iov = &out->parts[i];
		out->messages[i].msg_hdr.msg_iovlen = 1;
	}
}

static int send_batch(int socket, struct outgoing *out)
{
	for (int sent = 0; sent < BATCH;) {
		int count = sendmmsg(socket, out->messages + sent, (unsigned)(BATCH - sent), 0);

		if (count < 0)
			return -errno;
		sent += count;
	}
	return 0;
}

/* Returns 0 or a negative errno. */
int flood(struct flood *flood)
{
	static struct outgoing out;
	const uint64_t deadline = now_ms() + flood->milliseconds;
	uint64_t state = flood->seed, cid;

	if (flood->datagram_size > DATAGRAM_MAX || flood->datagram_size < flood->cid_offset + sizeof(cid))
		return -EINVAL;
	prepare(&out, flood);
	for (uint32_t turn = 0; !flood->stop && now_ms() < deadline; turn++) {
		int error;

		for (int i = 0; i < BATCH; i++) {
			cid = next_random(&state);
			memcpy(out.bytes[i] + flood->cid_offset, &cid, sizeof(cid));
		}
		if (!flood->socket_count)
			continue;
		error = send_batch(flood->sockets[turn % flood->socket_count], &out);
		if (error)
			return error;
		flood->sent += BATCH;
	}
	return 0;
}
