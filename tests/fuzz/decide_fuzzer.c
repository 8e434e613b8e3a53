/* SPDX-License-Identifier: MIT */
/*
 * The decision (csrc/decide.h) under libFuzzer with AddressSanitizer and UndefinedBehaviorSanitizer.
 *
 * `head` is a block of exactly QS_HEAD_LENGTH bytes, so that a read past it is seen. What lies behind the datagram is
 * filled in two ways, and no result may depend on it.
 */
#include <stdlib.h>

#include "cases.h"

static void require(int holds)
{
	if (!holds)
		abort();
}

static struct qs_decision decide_with(const struct qs_case *made, u8 filling)
{
	u8 *head = malloc(QS_HEAD_LENGTH);
	struct qs_decision decision;

	require(head != NULL);
	memset(head, filling, QS_HEAD_LENGTH);
	memcpy(head, made->datagram, made->length < QS_HEAD_LENGTH ? made->length : QS_HEAD_LENGTH);
	decision = qs_decide(&made->config, head, made->length);
	free(head);
	return decision;
}

/* What the decision promises, whatever the datagram. */
static void check(const struct qs_case *made, const struct qs_decision *decision)
{
	const u32 is_long = made->length && made->datagram[0] & QS_LONG_HEADER_BIT;

	switch (decision->outcome) {
	case QS_ROUTED:
		require(decision->slot < made->config.slots);
		break;
	case QS_DISPATCHED:
		require(is_long && decision->slot == QS_NO_SLOT);
		break;
	case QS_UNROUTABLE:
		require(!is_long && decision->slot == QS_NO_SLOT);
		break;
	case QS_MALFORMED:
		require(decision->slot == QS_NO_SLOT && decision->hash == 0);
		require(made->length <= QS_LONG_DCID_OFFSET + 255 ||
			(is_long && made->datagram[QS_LONG_DCID_LENGTH_OFFSET] < QS_CID_LENGTH_MIN));
		break;
	default:
		abort();
	}
	require(qs_table_index(decision->hash) < QS_TABLE_SIZE);
}

int LLVMFuzzerTestOneInput(const uint8_t *input, size_t size)
{
	u8 *room = malloc(size + 1);
	struct qs_case made;
	struct qs_decision decision, other;

	require(room != NULL);
	made = qs_make_case(input, size, room);
	decision = decide_with(&made, 0x00);
	other = decide_with(&made, 0xff);
	require(decision.outcome == other.outcome && decision.slot == other.slot && decision.hash == other.hash);
	check(&made, &decision);
	free(room);
	return 0;
}
