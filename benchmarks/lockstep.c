/* SPDX-License-Identifier: MIT */
/*
 * Sends batches of datagrams to a reuseport group on loopback and drains the group after each batch, in one thread.
 *
 * On loopback the whole receive path (lookup, steering program, queueing) runs inside the sender's system call. So the
 * timed sendmmsg() holds what a datagram costs, nothing is lost for want of a reader, and no second CPU takes part.
 *
 * Each datagram ends with the number of the socket that must get it; each arrival is held against it.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <netinet/in.h>
#include <sched.h>
#include <stdint.h>
#include <string.h>
#include <sys/socket.h>
#include <time.h>

enum {
	BATCH = 64,
	DATAGRAM_MAX = 2048,
	FIRST_SOURCE = 0x7f010001, /* 127.1.0.1; the flows differ in their source address */
	PATIENCE = 1000,	   /* rounds of sched_yield() for datagrams that ksoftirqd delivers */
};

/* Who must get the datagrams of a run. */
enum arrival {
	AT_NAMED_SOCKET,
	AT_ANY_SOCKET,
	NOWHERE,
};

/* The last bytes of a datagram. */
struct tag {
	uint32_t socket;
};

struct lockstep {
	const int32_t *clients; /* sending sockets, unconnected */
	const int32_t *sockets; /* the group's sockets, non-blocking */
	const uint8_t *datagrams; /* one of `datagram_size` bytes for each flow */
	uint64_t *send_ns;	/* out: one for each batch */
	uint32_t client_count, socket_count;
	uint32_t flow_count; /* a multiple of BATCH: each flow sends one datagram of a batch */
	uint32_t datagram_size;
	uint32_t port; /* of the group, on 127.0.0.1 */
	uint32_t batch_count;
	uint32_t arrival;
	uint32_t late; /* out: batches that took more than one look to arrive */
	uint64_t drain_ns;
	uint64_t received, misplaced, lost;
};

struct outgoing {
	struct sockaddr_in to;
	struct mmsghdr messages[BATCH];
	struct iovec parts[BATCH];
	union {
		char bytes[CMSG_SPACE(sizeof(struct in_pktinfo))];
		struct cmsghdr alignment;
	} controls[BATCH];
};

struct incoming {
	struct mmsghdr messages[BATCH];
	struct iovec parts[BATCH];
	uint8_t bytes[BATCH][DATAGRAM_MAX];
};

static uint64_t now(void)
{
	struct timespec time;

	clock_gettime(CLOCK_MONOTONIC, &time);
	return (uint64_t)time.tv_sec * 1000000000 + (uint64_t)time.tv_nsec;
}

/* Make the datagrams of `BATCH` flows, from `first` on. */
static void prepare(struct outgoing *out, const struct lockstep *run, uint32_t first)
{
	for (uint32_t i = 0; i < BATCH; i++) {
		struct msghdr *header = &out->messages[i].msg_hdr;
		struct in_pktinfo source = {.ipi_spec_dst.s_addr = htonl(FIRST_SOURCE + first + i)};
		struct cmsghdr *control;

		out->parts[i].iov_base = (void *)(run->datagrams + (size_t)(first + i) * run->datagram_size);
		out->parts[i].iov_len = run->datagram_size;
		header->msg_name = &out->to;
		header->msg_namelen = sizeof(out->to);
		header->msg_iov = &out->parts[i];
		header->msg_iovlen = 1;
		header->msg_control = out->controls[i].bytes;
		header->msg_controllen = sizeof(out->controls[i].bytes);
		header->msg_flags = 0;
		control = CMSG_FIRSTHDR(header);
		control->cmsg_level = IPPROTO_IP;
		control->cmsg_type = IP_PKTINFO;
		control->cmsg_len = CMSG_LEN(sizeof(source));
		memcpy(CMSG_DATA(control), &source, sizeof(source));
	}
}

static int send_batch(int client, struct outgoing *out)
{
	for (int sent = 0; sent < BATCH;) {
		int count = sendmmsg(client, out->messages + sent, (unsigned)(BATCH - sent), 0);

		if (count < 0)
			return -errno;
		sent += count;
	}
	return 0;
}

static int is_misplaced(const struct lockstep *run, uint32_t socket, const uint8_t *datagram, uint32_t length)
{
	struct tag tag;

	if (length != run->datagram_size || run->arrival == NOWHERE)
		return 1;
	memcpy(&tag, datagram + length - sizeof(tag), sizeof(tag));
	return run->arrival == AT_NAMED_SOCKET && tag.socket != socket;
}

/* Read what a socket of the group holds. Returns how many datagrams, or a negative errno. */
static int drain_socket(struct lockstep *run, uint32_t socket, struct incoming *in)
{
	int total = 0;

	for (;;) {
		int count = recvmmsg(run->sockets[socket], in->messages, BATCH, MSG_DONTWAIT, NULL);

		if (count < 0)
			return errno == EAGAIN || errno == EWOULDBLOCK ? total : -errno;
		for (int i = 0; i < count; i++)
			run->misplaced += (uint64_t)is_misplaced(run, socket, in->bytes[i], in->messages[i].msg_len);
		total += count;
		if (count < BATCH)
			return total;
	}
}

static int drain_batch(struct lockstep *run, struct incoming *in)
{
	const uint32_t expected = run->arrival == NOWHERE ? 0 : BATCH;
	uint32_t received = 0;

	for (uint32_t look = 0; look <= PATIENCE; look++) {
		for (uint32_t socket = 0; socket < run->socket_count; socket++) {
			int count = drain_socket(run, socket, in);

			if (count < 0)
				return count;
			received += (uint32_t)count;
		}
		run->late += look == 1;
		if (received >= expected)
			break;
		sched_yield();
	}
	run->received += received;
	run->lost += received < expected ? expected - received : 0;
	return 0;
}

/* Returns 0 or a negative errno. */
int lockstep(struct lockstep *run)
{
	static struct outgoing out;
	static struct incoming in;
	uint32_t first = 0;

	if (run->flow_count % BATCH || run->datagram_size > DATAGRAM_MAX || run->datagram_size < sizeof(struct tag))
		return -EINVAL;
	out.to = (struct sockaddr_in){
		.sin_family = AF_INET,
		.sin_port = htons((uint16_t)run->port),
		.sin_addr.s_addr = htonl(INADDR_LOOPBACK),
	};
	for (int i = 0; i < BATCH; i++) {
		in.parts[i] = (struct iovec){in.bytes[i], DATAGRAM_MAX};
		in.messages[i].msg_hdr.msg_iov = &in.parts[i];
		in.messages[i].msg_hdr.msg_iovlen = 1;
	}
	run->late = 0;
	run->drain_ns = run->received = run->misplaced = run->lost = 0;
	for (uint32_t batch = 0; batch < run->batch_count; batch++) {
		uint64_t start, sent;
		int error;

		prepare(&out, run, first);
		start = now();
		error = send_batch(run->clients[first / BATCH % run->client_count], &out);
		if (error)
			return error;
		sent = now();
		error = drain_batch(run, &in);
		if (error)
			return error;
		run->send_ns[batch] = sent - start;
		run->drain_ns += now() - sent;
		first = (first + BATCH) % run->flow_count;
	}
	return 0;
}
