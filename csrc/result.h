/* SPDX-License-Identifier: MIT */
/*
 * What a call answered. Error number and name of the call travel together, so that no error is ever reported for the
 * wrong call.
 */
#ifndef QS_RESULT_H
#define QS_RESULT_H

struct qs_result {
	int value;        /* what the call returned; -1 when it failed */
	int error;        /* errno, or 0 */
	const char *call; /* which call failed, or NULL */
};

static inline struct qs_result qs_ok(int value)
{
	return (struct qs_result){value, 0, 0};
}

static inline struct qs_result qs_failed(int error, const char *call)
{
	return (struct qs_result){-1, error, call};
}

#endif
