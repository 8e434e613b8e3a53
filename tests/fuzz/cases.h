/* SPDX-License-Identifier: MIT */
/* How arbitrary bytes become a group's configuration and a datagram, for the fuzzers of csrc/decide.h. */
#ifndef QS_CASES_H
#define QS_CASES_H

#include <string.h>

#include "decide.h"

struct qs_case {
	struct qs_config config;
	const u8 *datagram;
	u32 length;
};

/* The bytes of an input before the datagram. */
struct qs_case_head {
	u64 key0, key1;
	u8 cid_length, banks;
	u8 flags; /* CASE_... */
	u8 reserved;
	u16 listeners;
	u16 slot; /* for CASE_OURS */
};

enum {
	CASE_DROP_INVALID = 1,
	CASE_OURS = 2,  /* put the right seal on the DCID, which nobody finds by chance */
	CASE_CLOSE = 4, /* and let the slot be one that exists, or nearly so */
};

/* Let the DCID of a datagram name a slot, where there is room for it. */
static inline void qs_stamp(const struct qs_config *config, u8 *datagram, u32 length, u32 slot)
{
	const u32 offset = length && datagram[0] & QS_LONG_HEADER_BIT ? QS_LONG_DCID_OFFSET : QS_SHORT_DCID_OFFSET;
	const u32 body = config->cid_length - QS_SEAL_LENGTH;
	u32 seal;

	if (length < offset + config->cid_length)
		return;
	if (offset == QS_LONG_DCID_OFFSET)
		datagram[QS_LONG_DCID_LENGTH_OFFSET] = (u8)config->cid_length;
	seal = qs_seal(slot, qs_siphash24(config->key0, config->key1,
					  qs_read_cid(datagram + offset, config->cid_length).message));
	for (u32 i = 0; i < QS_SEAL_LENGTH; i++)
		datagram[offset + body + i] = (u8)(seal >> (8 * (QS_SEAL_LENGTH - 1 - i)));
}

/* Take an input apart; the datagram is written to `room`, which has space for all of the input. */
static inline struct qs_case qs_make_case(const u8 *input, size_t size, u8 *room)
{
	struct qs_case_head head = {0};
	const size_t used = size < sizeof(head) ? size : sizeof(head);
	struct qs_case made;
	u32 slot;

	memcpy(&head, input, used);
	made.config.key0 = head.key0;
	made.config.key1 = head.key1;
	made.config.cid_length = QS_CID_LENGTH_MIN + head.cid_length % (QS_CID_LENGTH_MAX - QS_CID_LENGTH_MIN + 1);
	made.config.listeners = 1 + head.listeners % QS_TABLE_SIZE;
	made.config.slots = made.config.listeners * (1 + head.banks % (QS_SLOTS_MAX / QS_TABLE_SIZE));
	made.config.drop_invalid = head.flags & CASE_DROP_INVALID;
	made.length = (u32)(size - used);
	made.datagram = room;
	memcpy(room, input + used, made.length);
	slot = head.flags & CASE_CLOSE ? head.slot % (made.config.slots + 2) : head.slot;
	if (head.flags & CASE_OURS)
		qs_stamp(&made.config, room, made.length, slot & 0xffff);
	return made;
}

#endif
