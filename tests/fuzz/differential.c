/* SPDX-License-Identifier: MIT */
/*
 * The decision in the kernel (decide.bpf.c) against the native build, on cases that a seed determines:
 *
 *     differential OBJECT SECONDS SEED
 *
 * Prints the figures as JSON, or the first case on which they differ, and ends with status 1 then.
 */
#include <bpf/bpf.h>
#include <bpf/libbpf.h>
#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <time.h>

#include "cases.h"

enum {
	ETHERNET_HEADER_LENGTH = 14,
	DATAGRAM_MAX = 300, /* a DCID of 255 bytes and what is behind it */
	INPUT_MAX = sizeof(struct qs_case_head) + DATAGRAM_MAX,
	BATCH = 1000,
};

struct kernel {
	int copied, in_place;
	struct qs_config *config;
	struct qs_decision *decision;
};

struct figures {
	u64 cases, runs, outcomes[QS_OUTCOMES];
	double seconds;
};

static u64 state;

/* splitmix64 (Steele, Lea, Flood, 2014) */
static u64 draw(void)
{
	u64 value = state += 0x9e3779b97f4a7c15ULL;

	value = (value ^ value >> 30) * 0xbf58476d1ce4e5b9ULL;
	value = (value ^ value >> 27) * 0x94d049bb133111ebULL;
	return value ^ value >> 31;
}

static void fail(const char *what)
{
	fprintf(stderr, "%s\n", what);
	exit(2);
}

/* Random bytes in which the fields that decide most have interesting values: half of them near a length of ours. */
static u32 make_input(u8 *input)
{
	const u32 head = sizeof(struct qs_case_head);
	u32 size = head + (draw() & 1 ? draw() % 40 : draw() % DATAGRAM_MAX);

	for (u32 i = 0; i < INPUT_MAX; i += sizeof(u64)) {
		const u64 word = draw();

		memcpy(input + i, &word, sizeof(word) < INPUT_MAX - i ? sizeof(word) : INPUT_MAX - i);
	}
	if (draw() & 1) {
		const u32 cid_length =
			QS_CID_LENGTH_MIN + input[2 * sizeof(u64)] % (QS_CID_LENGTH_MAX - QS_CID_LENGTH_MIN + 1);

		input[head + QS_LONG_DCID_LENGTH_OFFSET] = (u8)(cid_length - 1 + draw() % 3);
	}
	return size;
}

static void *map_memory(struct bpf_object *object, const char *name, size_t size)
{
	struct bpf_map *map = bpf_object__find_map_by_name(object, name);
	void *memory = mmap(NULL, size, PROT_READ | PROT_WRITE, MAP_SHARED, bpf_map__fd(map), 0);

	if (memory == MAP_FAILED)
		fail("mmap of a map");
	return memory;
}

static struct kernel load(const char *path)
{
	struct bpf_object *object = bpf_object__open_file(path, NULL);

	if (!object || bpf_object__load(object))
		fail("the kernel does not take the object");
	return (struct kernel){
		.copied = bpf_program__fd(bpf_object__find_program_by_name(object, "copied")),
		.in_place = bpf_program__fd(bpf_object__find_program_by_name(object, "in_place")),
		.config = map_memory(object, "config", sizeof(struct qs_config)),
		.decision = map_memory(object, "decision", sizeof(struct qs_decision)),
	};
}

static int run(int program, const u8 *frame, u32 length)
{
	LIBBPF_OPTS(bpf_test_run_opts, options, .data_in = frame, .data_size_in = ETHERNET_HEADER_LENGTH + length);

	if (bpf_prog_test_run_opts(program, &options))
		fail("BPF_PROG_TEST_RUN");
	return options.retval == 1;
}

static void report(const char *way, const struct qs_case *made, const struct qs_decision *native,
		   const struct qs_decision *other)
{
	printf("%s: native %u slot %u hash %016" PRIx64 ", kernel %u slot %u hash %016" PRIx64 "\n", way,
	       native->outcome, native->slot, native->hash, other->outcome, other->slot, other->hash);
	printf("key %016" PRIx64 " %016" PRIx64 " cid length %u slots %u datagram ", made->config.key0,
	       made->config.key1, made->config.cid_length, made->config.slots);
	for (u32 i = 0; i < made->length; i++)
		printf("%02x", made->datagram[i]);
	printf("\n");
	exit(1);
}

static void compare(const struct kernel *kernel, int program, const char *way, const struct qs_case *made,
		    const u8 *frame, struct figures *figures)
{
	u8 head[QS_HEAD_LENGTH];
	struct qs_decision native;

	memset(head, 0xaa, sizeof(head));
	memcpy(head, made->datagram, made->length < sizeof(head) ? made->length : sizeof(head));
	native = qs_decide(&made->config, head, made->length);
	*kernel->config = made->config;
	*kernel->decision = (struct qs_decision){QS_OUTCOMES, 0, 0};
	if (!run(program, frame, made->length))
		fail("the program did not decide");
	if (native.outcome != kernel->decision->outcome || native.slot != kernel->decision->slot ||
	    native.hash != kernel->decision->hash)
		report(way, made, &native, kernel->decision);
	figures->runs++;
	figures->outcomes[native.outcome]++;
}

static void run_case(const struct kernel *kernel, struct figures *figures)
{
	u8 input[INPUT_MAX], frame[ETHERNET_HEADER_LENGTH + INPUT_MAX] = {0};
	const u32 size = make_input(input);
	struct qs_case made = qs_make_case(input, size, frame + ETHERNET_HEADER_LENGTH);

	figures->cases++;
	if (made.length)
		compare(kernel, kernel->copied, "copied", &made, frame, figures);
	if (made.length >= QS_HEAD_LENGTH)
		compare(kernel, kernel->in_place, "in place", &made, frame, figures);
}

static double now(void)
{
	struct timespec time;

	clock_gettime(CLOCK_MONOTONIC, &time);
	return (double)time.tv_sec + (double)time.tv_nsec / 1e9;
}

int main(int argc, char **argv)
{
	struct figures figures = {0};
	struct kernel kernel;
	double start;

	if (argc != 4)
		fail("usage: differential OBJECT SECONDS SEED");
	state = strtoull(argv[3], NULL, 0);
	kernel = load(argv[1]);
	start = now();
	do {
		for (int i = 0; i < BATCH; i++)
			run_case(&kernel, &figures);
		figures.seconds = now() - start;
	} while (figures.seconds < strtod(argv[2], NULL));
	printf("{\"cases\": %" PRIu64 ", \"runs\": %" PRIu64 ", \"seconds\": %.1f, \"outcomes\": [%" PRIu64 ", %" PRIu64
	       ", %" PRIu64 ", %" PRIu64 "]}\n",
	       figures.cases, figures.runs, figures.seconds, figures.outcomes[0], figures.outcomes[1],
	       figures.outcomes[2], figures.outcomes[3]);
	return 0;
}
