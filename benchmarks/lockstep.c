/* SPDX-License-Identifier: MIT */
/*
 * Sends batches of datagrams to the sockets of an address and drains them after each batch, in one thread.
 *
 * On loopback and between two veths the whole receive path (lookup, steering program, queueing) runs inside the
 * sender's system call. So the timed sendmmsg() holds what a datagram costs, nothing is lost for want of a reader, and
 * no second CPU takes part.
 *
 * Each datagram ends with the number of the socket that must get it; each arrival is held against it.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <netinet/in.h>
#include <netinet/udp.h>
#include <sched.h>
#include <stdint.h>
#include <string.h>
#include <sys/socket.h>
#include <time.h>

enum {
	BATCH = 64,
	DATAGRAM_MAX = 2048,
	SEGMENTS_MAX = 16,
	PATIENCE = 1000, /* rounds of sched_yield() for datagrams that ksoftirqd delivers */
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
	const int32_t *clients;   /* sending sockets, unconnected */
	const int32_t *sockets;   /* who receives, non-blocking */
	const uint8_t *datagrams; /* one of `datagram_size` bytes for each flow */
	uint64_t *send_ns;        /* out: one for each batch */
	uint64_t *counts;         /* out: datagrams that each socket got */
	uint32_t client_count, socket_count;
	uint32_t flow_count; /* divides BATCH, or a multiple of it */
	uint32_t datagram_size;
	uint32_t segments;   /* datagrams of a flow that are sent as one (UDP_SEGMENT), at most SEGMENTS_MAX */
	uint32_t host, port; /* where to, in host byte order */
	uint32_t source;     /* of the first flow; the others follow, each with an address of its own */
	uint32_t batch_count;
	uint32_t arrival;
	uint32_t named_only; /* read after each batch what it names, the other sockets once at the end */
	uint32_t late;       /* out: batches that took more than one look to arrive */
	uint64_t received, misplaced, lost;
};

struct outgoing {
	struct sockaddr_in to;
	struct mmsghdr messages[BATCH];
	struct iovec parts[BATCH][SEGMENTS_MAX];
	union {
		char bytes[CMSG_SPACE(sizeof(struct in_pktinfo)) + CMSG_SPACE(sizeof(uint16_t))];
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

/* The flow of a message of the batch that begins with flow `first`. */
static uint32_t flow_of(const struct lockstep *run, uint32_t first, uint32_t message)
{
	return (first + message) % run->flow_count;
}

static void add_control(struct msghdr *header, struct cmsghdr *control, int level, int type, const void *value,
			size_t length)
{
	control->cmsg_level = level;
	control->cmsg_type = type;
	control->cmsg_len = CMSG_LEN(length);
	memcpy(CMSG_DATA(control), value, length);
	header->msg_controllen += CMSG_SPACE(length);
}

static void prepare(struct outgoing *out, const struct lockstep *run, uint32_t first)
{
	for (uint32_t i = 0; i < BATCH / run->segments; i++) {
		const uint32_t flow = flow_of(run, first, i);
		const uint16_t size = (uint16_t)run->datagram_size;
		struct msghdr *header = &out->messages[i].msg_hdr;
		struct in_pktinfo source = {.ipi_spec_dst.s_addr = htonl(run->source + flow)};

		for (uint32_t segment = 0; segment < run->segments; segment++)
			out->parts[i][segment] = (struct iovec){
				(void *)(run->datagrams + (size_t)flow * run->datagram_size),
				run->datagram_size,
			};
		memset(&out->controls[i], 0, sizeof(out->controls[i]));
		*header = (struct msghdr){
			.msg_name = &out->to,
			.msg_namelen = sizeof(out->to),
			.msg_iov = out->parts[i],
			.msg_iovlen = run->segments,
			.msg_control = out->controls[i].bytes,
			.msg_controllen = sizeof(out->controls[i].bytes),
		};
		struct cmsghdr *control = CMSG_FIRSTHDR(header);
		struct cmsghdr *next = (struct cmsghdr *)((char *)control + CMSG_SPACE(sizeof(source)));

		header->msg_controllen = 0;
		add_control(header, control, IPPROTO_IP, IP_PKTINFO, &source, sizeof(source));
		if (run->segments > 1)
			add_control(header, next, SOL_UDP, UDP_SEGMENT, &size, sizeof(size));
	}
}

static int send_batch(int client, struct outgoing *out, int messages)
{
	for (int sent = 0; sent < messages;) {
		int count = sendmmsg(client, out->messages + sent, (unsigned)(messages - sent), 0);

		if (count < 0)
			return -errno;
		sent += count;
	}
	return 0;
}

static uint32_t named_by(const struct lockstep *run, const uint8_t *datagram)
{
	struct tag tag;

	memcpy(&tag, datagram + run->datagram_size - sizeof(tag), sizeof(tag));
	return tag.socket;
}

static int is_misplaced(const struct lockstep *run, uint32_t socket, const uint8_t *datagram, uint32_t length)
{
	if (length != run->datagram_size || run->arrival == NOWHERE)
		return 1;
	return run->arrival == AT_NAMED_SOCKET && named_by(run, datagram) != socket;
}

/* Read what a socket holds. Returns how many datagrams, or a negative errno. */
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
		run->counts[socket] += (uint64_t)count;
		if (count < BATCH)
			return total;
	}
}

static int drain_all(struct lockstep *run, struct incoming *in)
{
	int total = 0;

	for (uint32_t socket = 0; socket < run->socket_count; socket++) {
		int count = drain_socket(run, socket, in);

		if (count < 0)
			return count;
		total += count;
	}
	return total;
}

static int drain_named(struct lockstep *run, uint32_t first, struct incoming *in)
{
	int total = 0;

	for (uint32_t i = 0; i < BATCH / run->segments; i++) {
		const uint32_t flow = flow_of(run, first, i);
		int count = drain_socket(run, named_by(run, run->datagrams + (size_t)flow * run->datagram_size), in);

		if (count < 0)
			return count;
		total += count;
	}
	return total;
}

static int drain_batch(struct lockstep *run, uint32_t first, struct incoming *in)
{
	const uint32_t expected = run->arrival == NOWHERE ? 0 : BATCH;
	uint32_t received = 0;

	for (uint32_t look = 0; look <= PATIENCE; look++) {
		int count = run->named_only ? drain_named(run, first, in) : drain_all(run, in);

		if (count < 0)
			return count;
		received += (uint32_t)count;
		run->late += look == 1;
		if (received >= expected)
			break;
		sched_yield();
	}
	run->received += received;
	run->lost += received < expected ? expected - received : 0;
	return 0;
}

static int is_possible(const struct lockstep *run)
{
	return run->flow_count && (run->flow_count % BATCH == 0 || BATCH % run->flow_count == 0) &&
	       run->datagram_size <= DATAGRAM_MAX && run->datagram_size >= sizeof(struct tag) && run->segments &&
	       run->segments <= SEGMENTS_MAX && BATCH % run->segments == 0;
}

/* Returns 0 or a negative errno. */
int lockstep(struct lockstep *run)
{
	static struct outgoing out;
	static struct incoming in;
	uint32_t first = 0;
	int rest;

	if (!is_possible(run))
		return -EINVAL;
	out.to = (struct sockaddr_in){
		.sin_family = AF_INET,
		.sin_port = htons((uint16_t)run->port),
		.sin_addr.s_addr = htonl(run->host),
	};
	for (int i = 0; i < BATCH; i++) {
		in.parts[i] = (struct iovec){in.bytes[i], DATAGRAM_MAX};
		in.messages[i].msg_hdr.msg_iov = &in.parts[i];
		in.messages[i].msg_hdr.msg_iovlen = 1;
	}
	run->late = 0;
	run->received = run->misplaced = run->lost = 0;
	for (uint32_t batch = 0; batch < run->batch_count; batch++) {
		const int messages = (int)(BATCH / run->segments);
		uint64_t start;
		int error;

		prepare(&out, run, first);
		start = now();
		error = send_batch(run->clients[first / BATCH % run->client_count], &out, messages);
		if (error)
			return error;
		run->send_ns[batch] = now() - start;
		error = drain_batch(run, first, &in);
		if (error)
			return error;
		first = flow_of(run, first, (uint32_t)messages);
	}
	rest = drain_all(run, &in);
	if (rest < 0)
		return rest;
	run->received += (uint64_t)rest;
	return 0;
}
