/* SPDX-License-Identifier: MIT */
/*
 * Calls every function of csrc/ so that it succeeds and so that it fails: with wrong arguments, without descriptors,
 * without memory. Built with sanitizers or run under valgrind it shows wrong accesses and leaks; by itself it sees to
 * it that no descriptor and no child process stays.
 *
 *     driver ROUNDS
 */
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <sys/wait.h>
#include <unistd.h>

#include "loader.h"
#include "sockets.h"
#include "spawn.h"
#include "trace.h"

enum {
	NOT_OPEN = 1000000,
	SLOTS = 4,
	LOG_SIZE = 200,
	MOST_ALLOCATIONS = 4,
	MOST_DESCRIPTORS = 12,
};

static const struct qs_config CONFIG = {.cid_length = QS_CID_LENGTH_DEFAULT, .listeners = 2, .slots = SLOTS};

/* The linker sends the allocations of csrc/ here (--wrap): the one with this number fails. */
static int allocations_left = -1;

void *__real_malloc(size_t size);
void *__real_calloc(size_t count, size_t size);
void *__wrap_malloc(size_t size);
void *__wrap_calloc(size_t count, size_t size);

static int may_allocate(void)
{
	return allocations_left < 0 || allocations_left-- > 0;
}

void *__wrap_malloc(size_t size)
{
	return may_allocate() ? __real_malloc(size) : NULL;
}

void *__wrap_calloc(size_t count, size_t size)
{
	return may_allocate() ? __real_calloc(count, size) : NULL;
}

static void require(int holds, const char *what)
{
	if (holds)
		return;
	fprintf(stderr, "%s: %s\n", what, strerror(errno));
	exit(1);
}

#define REQUIRE(condition) require(condition, #condition)

/* A failure names its call and its error, and nothing else. */
static void require_failure(struct qs_result result, const char *what)
{
	require(result.value == -1 && result.error > 0 && result.call && *result.call, what);
}

#define REQUIRE_FAILURE(call) require_failure(call, #call)

static int count_descriptors(void)
{
	DIR *directory = opendir("/proc/self/fd");
	int count = 0;

	REQUIRE(directory != NULL);
	while (readdir(directory))
		count++;
	closedir(directory);
	return count;
}

static int open_socket(int bound)
{
	const struct sockaddr_in anywhere = {.sin_family = AF_INET, .sin_addr.s_addr = htonl(INADDR_LOOPBACK)};
	const int yes = 1;
	const int fd = socket(AF_INET, SOCK_DGRAM | SOCK_CLOEXEC, 0);

	REQUIRE(fd >= 0);
	REQUIRE(!setsockopt(fd, SOL_SOCKET, SO_REUSEPORT, &yes, sizeof(yes)));
	if (bound)
		REQUIRE(!bind(fd, (const struct sockaddr *)&anywhere, sizeof(anywhere)));
	return fd;
}

static void close_program(const struct qs_program *program)
{
	close(program->program);
	close(program->sockets);
	close(program->table);
	close(program->counters);
}

static void call_sockets(void)
{
	const struct qs_classic to_slot_0 = {0x06, 0, 0, 0};
	const int fd = open_socket(0);
	struct qs_meminfo info;

	REQUIRE(!qs_close_filter(fd).error);
	REQUIRE(!qs_open_filter(fd).error);
	REQUIRE_FAILURE(qs_open_filter(fd));
	REQUIRE_FAILURE(qs_close_filter(NOT_OPEN));
	REQUIRE_FAILURE(qs_attach_classic(fd, &to_slot_0, 0));
	REQUIRE(!qs_attach_classic(fd, &to_slot_0, 1).error);
	REQUIRE_FAILURE(qs_attach_program(fd, NOT_OPEN));
	REQUIRE(!qs_read_meminfo(fd, &info).error && info.buffer > 0);
	REQUIRE_FAILURE(qs_read_meminfo(NOT_OPEN, &info));
	close(fd);
}

static void call_loader(void)
{
	struct qs_config wrong = CONFIG;
	struct qs_program program;
	u64 sums[QS_OUTCOMES];
	char log[LOG_SIZE];
	const int fd = open_socket(1);

	REQUIRE(!qs_load_program(&CONFIG, &program, log, sizeof(log)).error);
	REQUIRE(!qs_set_socket(program.sockets, 0, fd).error);
	REQUIRE_FAILURE(qs_set_socket(program.sockets, SLOTS + 1, fd));
	REQUIRE_FAILURE(qs_set_socket(program.sockets, 1, NOT_OPEN));
	REQUIRE(!qs_set_listener(program.table, QS_TABLE_SIZE - 1, 1).error);
	REQUIRE_FAILURE(qs_set_listener(program.table, QS_TABLE_SIZE, 1));
	REQUIRE(!qs_read_counters(program.counters, SLOTS, sums).error);
	REQUIRE_FAILURE(qs_read_counters(program.counters, SLOTS + 1, sums));
	allocations_left = 0;
	REQUIRE(qs_read_counters(program.counters, 0, sums).error == ENOMEM);
	allocations_left = -1;
	close_program(&program);
	wrong.listeners = 0;
	REQUIRE_FAILURE(qs_load_program(&wrong, &program, log, sizeof(log)));
	wrong = CONFIG;
	wrong.slots = QS_NO_SLOT - 1;
	REQUIRE_FAILURE(qs_load_program(&wrong, &program, log, sizeof(log)));
	close(fd);
}

static void call_trace(void)
{
	u64 count;
	const int counts = qs_make_counts(SLOTS).value;

	REQUIRE(counts >= 0);
	REQUIRE(!qs_read_count(counts, 0, &count).error && count == 0);
	REQUIRE_FAILURE(qs_read_count(counts, SLOTS, &count));
	REQUIRE_FAILURE(qs_make_counts(0));
	REQUIRE_FAILURE(qs_load_tracing("", 0));
	REQUIRE_FAILURE(qs_open_tracepoint(counts, "kfree_skb"));
	close(counts);
}

static void call_probe(void)
{
	struct qs_bpf_answers answers;

	REQUIRE(!qs_probe_bpf(&answers).error);
	REQUIRE(!answers.signal);
}

static void wait_for(pid_t child)
{
	int status;

	REQUIRE(waitpid(child, &status, 0) == child);
	REQUIRE(WIFEXITED(status) && WEXITSTATUS(status) == 0);
}

static void call_spawn(void)
{
	char *const arguments[] = {"true", NULL};
	char *const environment[] = {"A=1", "LISTEN_PID=", "B=2", NULL};
	const int descriptors[] = {0, NOT_OPEN};
	struct qs_spawn spawn = {"/bin/true", arguments, environment, descriptors, 1, QS_KEEP_ID, QS_KEEP_ID, 0};
	struct qs_result result = qs_spawn(&spawn);

	REQUIRE(!result.error);
	wait_for(result.value);
	for (int allowed = 0; allowed < MOST_ALLOCATIONS; allowed++) {
		allocations_left = allowed;
		result = qs_spawn(&spawn);
		allocations_left = -1;
		REQUIRE(result.error == 0 || result.error == ENOMEM);
		if (!result.error)
			wait_for(result.value);
	}
	spawn.descriptor_count = 2;
	REQUIRE_FAILURE(qs_spawn(&spawn));
	spawn.descriptor_count = 0;
	spawn.path = "/nonexistent";
	REQUIRE_FAILURE(qs_spawn(&spawn));
	REQUIRE(waitpid(-1, NULL, WNOHANG) < 0 && errno == ECHILD);
}

/* With so many descriptors that each step fails once. */
static void call_without_descriptors(void)
{
	char *const arguments[] = {"true", NULL};
	char *const environment[] = {NULL};
	const struct qs_spawn spawn = {"/bin/true", arguments,  environment, NULL,
				       0,           QS_KEEP_ID, QS_KEEP_ID,  1 << SIGINT};
	struct rlimit limit;
	const int free = dup(0);

	close(free);
	REQUIRE(!getrlimit(RLIMIT_NOFILE, &limit));
	for (int room = 0; room < MOST_DESCRIPTORS; room++) {
		const struct rlimit tight = {(rlim_t)(free + room), limit.rlim_max};
		struct qs_bpf_answers answers;
		struct qs_program program;
		char log[LOG_SIZE];

		REQUIRE(!setrlimit(RLIMIT_NOFILE, &tight));
		const struct qs_result loaded = qs_load_program(&CONFIG, &program, log, sizeof(log));
		const struct qs_result spawned = qs_spawn(&spawn);
		qs_probe_bpf(&answers);
		REQUIRE(!setrlimit(RLIMIT_NOFILE, &limit));
		REQUIRE(!loaded.error || loaded.error == EMFILE);
		REQUIRE(!spawned.error || spawned.error == EMFILE);
		if (!loaded.error)
			close_program(&program);
		if (!spawned.error)
			wait_for(spawned.value);
	}
}

int main(int argc, char **argv)
{
	const int rounds = argc > 1 ? atoi(argv[1]) : 1;
	const int before = count_descriptors();

	for (int round = 0; round < rounds; round++) {
		call_sockets();
		call_loader();
		call_trace();
		call_probe();
		call_spawn();
		call_without_descriptors();
	}
	REQUIRE(count_descriptors() == before);
	printf("%d rounds\n", rounds);
	return 0;
}
