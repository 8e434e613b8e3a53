/* SPDX-License-Identifier: MIT */
#include "spawn.h"

#include <errno.h>
#include <fcntl.h>
#include <grp.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/wait.h>
#include <unistd.h>

#ifdef __linux__
#include <sys/prctl.h>
#ifndef PR_CAP_AMBIENT
#define PR_CAP_AMBIENT 47
#define PR_CAP_AMBIENT_CLEAR_ALL 4
#endif
#endif

/* The steps of the child that can fail; an index travels through the pipe, since pointers mean nothing there. */
static const char *const STEPS[] = {"fcntl(F_DUPFD)", "dup2", "setgroups", "setregid", "setreuid", "execve"};
enum { STEP_COPY, STEP_PLACE, STEP_GROUPS, STEP_GID, STEP_UID, STEP_EXECUTE };

struct failure {
	int error, step;
};

static const char PID_VARIABLE[] = "LISTEN_PID=";
#define PID_DIGITS 20

static void give_up(int report, int step)
{
	const struct failure failure = {errno, step};
	ssize_t written = write(report, &failure, sizeof(failure));

	_exit(written == sizeof(failure) ? 127 : 126);
}

/* Move the descriptors to 3, 4, ...: first out of the way of each other, then into place. */
static void place_descriptors(const struct qs_spawn *spawn, int *copies, int *report)
{
	const int end = QS_FIRST_FD + (int)spawn->descriptor_count;
	int moved = fcntl(*report, F_DUPFD_CLOEXEC, end);

	if (moved < 0)
		give_up(*report, STEP_COPY);
	*report = moved;
	for (u32 i = 0; i < spawn->descriptor_count; i++) {
		copies[i] = fcntl(spawn->descriptors[i], F_DUPFD_CLOEXEC, end);
		if (copies[i] < 0)
			give_up(*report, STEP_COPY);
	}
	for (u32 i = 0; i < spawn->descriptor_count; i++)
		if (dup2(copies[i], QS_FIRST_FD + (int)i) < 0)
			give_up(*report, STEP_PLACE);
}

static void drop_privileges(const struct qs_spawn *spawn, int report)
{
#ifdef __linux__
	/* Fails before Linux 4.3, which has no ambient capabilities. */
	prctl(PR_CAP_AMBIENT, PR_CAP_AMBIENT_CLEAR_ALL, 0, 0, 0);
#endif
	if (spawn->gid != QS_KEEP_ID) {
		if (setgroups(0, NULL))
			give_up(report, STEP_GROUPS);
		if (setregid(spawn->gid, spawn->gid))
			give_up(report, STEP_GID);
	}
	if (spawn->uid != QS_KEEP_ID && setreuid(spawn->uid, spawn->uid))
		give_up(report, STEP_UID);
}

/*
 * Let signals have their default effect again, but for those that shall be ignored. All were blocked before the fork,
 * so none has met a handler of the parent here: through the descriptor that they share, the parent would have taken it
 * for one of its own.
 */
static void forget_handlers(u64 ignored)
{
	sigset_t none;

	for (int number = 1; number < NSIG; number++) {
		struct sigaction action;

		if (number < QS_SIGNALS && ignored >> number & 1) {
			signal(number, SIG_IGN);
			continue;
		}
		if (sigaction(number, NULL, &action))
			continue;
		/* What is ignored stays so, but for the two that CPython ignores: a new program expects the defaults.
		 */
		if (action.sa_handler != SIG_IGN || number == SIGPIPE || number == SIGXFSZ)
			signal(number, SIG_DFL);
	}
	sigemptyset(&none);
	sigprocmask(SIG_SETMASK, &none, NULL);
}

/* Async-signal-safe: the parent may have threads. */
static void run_child(const struct qs_spawn *spawn, char *const *environment, char *pid_digits, int *copies, int report)
{
	place_descriptors(spawn, copies, &report);
	drop_privileges(spawn, report);
	if (pid_digits) {
		char digits[PID_DIGITS];
		int count = 0;

		for (pid_t pid = getpid(); pid > 0; pid /= 10)
			digits[count++] = (char)('0' + pid % 10);
		while (count > 0)
			*pid_digits++ = digits[--count];
		*pid_digits = 0;
	}
	forget_handlers(spawn->ignored);
	execve(spawn->path, spawn->arguments, environment);
	give_up(report, STEP_EXECUTE);
}

/* Wait for the child to run its program; the pipe closes on exec. */
static struct qs_result await_start(pid_t child, int report)
{
	struct failure failure;
	ssize_t length;

	do
		length = read(report, &failure, sizeof(failure));
	while (length < 0 && errno == EINTR);
	if (length == 0)
		return qs_ok(child);
	while (waitpid(child, NULL, 0) < 0 && errno == EINTR)
		;
	if (length != (ssize_t)sizeof(failure))
		return qs_failed(EPIPE, "read(spawn)");
	return qs_failed(failure.error, STEPS[failure.step]);
}

struct qs_result qs_spawn(const struct qs_spawn *spawn)
{
	char pid_entry[sizeof(PID_VARIABLE) + PID_DIGITS];
	char *pid_digits = NULL;
	struct qs_result result;
	sigset_t all, before;
	char **environment;
	int report[2], *copies;
	u32 entries = 0;
	pid_t child;

	while (spawn->environment[entries])
		entries++;
	environment = malloc((entries + 1) * sizeof(*environment));
	copies = malloc((spawn->descriptor_count + 1) * sizeof(*copies));
	if (!environment || !copies) {
		free(environment);
		free(copies);
		return qs_failed(ENOMEM, "malloc");
	}
	for (u32 i = 0; i <= entries; i++) {
		environment[i] = spawn->environment[i];
		if (environment[i] && !strcmp(environment[i], PID_VARIABLE)) {
			strcpy(pid_entry, PID_VARIABLE);
			pid_digits = pid_entry + sizeof(PID_VARIABLE) - 1;
			environment[i] = pid_entry;
		}
	}
	if (pipe(report)) {
		result = qs_failed(errno, "pipe");
	} else {
		fcntl(report[0], F_SETFD, FD_CLOEXEC);
		fcntl(report[1], F_SETFD, FD_CLOEXEC);
		sigfillset(&all);
		pthread_sigmask(SIG_BLOCK, &all, &before);
		child = fork();
		if (child == 0)
			run_child(spawn, environment, pid_digits, copies, report[1]);
		result = child < 0 ? qs_failed(errno, "fork") : qs_ok(child);
		pthread_sigmask(SIG_SETMASK, &before, NULL);
		close(report[1]);
		if (!result.error)
			result = await_start(child, report[0]);
		close(report[0]);
	}
	free(environment);
	free(copies);
	return result;
}
