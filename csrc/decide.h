/* SPDX-License-Identifier: MIT */
/*
 * The steering decision for one datagram. The eBPF program, the extension and the fuzzers all compile this file;
 * quicsteer/decision.py is the same in Python, quicsteer/classic.py the same as a classic BPF program.
 *
 * Contract: `head` has QS_HEAD_LENGTH readable bytes. Those behind the end of the datagram may hold anything: no
 * result depends on them. `length` is the length of the whole datagram. Only what RFC 8999 guarantees is read.
 *
 * Offsets into `head` are constants in each branch, since the kernel's verifier refuses variable ones to a process
 * that has CAP_BPF without CAP_PERFMON.
 */
#ifndef QS_DECIDE_H
#define QS_DECIDE_H

#include "siphash.h"

/* What the decision of one group depends on. */
struct qs_config {
	u64 key0, key1; /* the SipHash key, as little-endian integers */
	u32 cid_length; /* QS_CID_LENGTH_MIN to QS_CID_LENGTH_MAX */
	u32 listeners;  /* listener slots */
	u32 slots;      /* all slots; the index after the last one is the sink */
	u32 drop_invalid;
};

/* The bytes of a connection ID that are looked at. */
struct qs_cid {
	u64 message; /* what is hashed */
	u32 seal;    /* what names the slot, if we issued it */
};

struct qs_decision {
	u32 outcome; /* QS_ROUTED ... */
	u32 slot;    /* where QS_ROUTED goes */
	u64 hash;    /* of the DCID, for QS_DISPATCHED and QS_UNROUTABLE */
};

QS_INLINE u32 qs_seal_word(u32 slot, u64 hash)
{
	u32 check = slot * (u32)(hash >> 32) >> 16;

	return check << 16 | slot;
}

QS_INLINE u32 qs_seal(u32 slot, u64 hash)
{
	return qs_seal_word(slot, hash) ^ (u32)hash;
}

/* Returns the slot that a seal names, or QS_NO_SLOT when it is not one of ours. */
QS_INLINE u32 qs_open_seal(u32 seal, u64 hash)
{
	u32 word = seal ^ (u32)hash;
	u32 slot = word & 0xffff;

	return word == qs_seal_word(slot, hash) ? slot : QS_NO_SLOT;
}

/* The first eight bytes of a DCID that a client chose. */
QS_INLINE u64 qs_first_message(const u8 *dcid)
{
	u64 message = 0;

	for (u32 i = 0; i < QS_MESSAGE_LENGTH; i++)
		message |= (u64)dcid[i] << 8 * i;
	return message;
}

/*
 * The parts of a connection ID of ours, which is `length` bytes long: the last eight bytes of the body (padded on the
 * right when it has fewer) and the seal behind the body. `length` is a constant wherever this is inlined.
 */
QS_INLINE struct qs_cid qs_split_cid(const u8 *cid, const u32 length)
{
	const u32 body = length - QS_SEAL_LENGTH;
	const u32 used = body < QS_MESSAGE_LENGTH ? body : QS_MESSAGE_LENGTH;
	struct qs_cid parts = {0, 0};

	for (u32 i = 0; i < used; i++)
		parts.message |= (u64)cid[body - used + i] << 8 * i;
	for (u32 i = 0; i < QS_SEAL_LENGTH; i++)
		parts.seal = parts.seal << 8 | cid[body + i];
	return parts;
}

QS_INLINE struct qs_cid qs_read_cid(const u8 *cid, u32 length)
{
	switch (length) {
	case 8:
		return qs_split_cid(cid, 8);
	case 9:
		return qs_split_cid(cid, 9);
	case 10:
		return qs_split_cid(cid, 10);
	case 11:
		return qs_split_cid(cid, 11);
	case 12:
		return qs_split_cid(cid, 12);
	case 13:
		return qs_split_cid(cid, 13);
	case 14:
		return qs_split_cid(cid, 14);
	case 15:
		return qs_split_cid(cid, 15);
	case 16:
		return qs_split_cid(cid, 16);
	case 17:
		return qs_split_cid(cid, 17);
	case 18:
		return qs_split_cid(cid, 18);
	case 19:
		return qs_split_cid(cid, 19);
	default:
		return qs_split_cid(cid, 20);
	}
}

/* `config` is volatile for the sake of the eBPF program (bpf/steer.bpf.c). */
QS_INLINE struct qs_decision qs_decide(const volatile struct qs_config *config, const u8 *head, u32 length)
{
	const struct qs_decision malformed = {QS_MALFORMED, QS_NO_SLOT, 0};
	struct qs_decision decision = malformed;
	const u32 cid_length = config->cid_length;
	struct qs_cid cid;
	u32 ours = 1;

	if (length < QS_SHORT_DCID_OFFSET)
		return malformed;
	if (head[0] & QS_LONG_HEADER_BIT) {
		if (length < QS_LONG_DCID_OFFSET)
			return malformed;
		const u32 dcid_length = head[QS_LONG_DCID_LENGTH_OFFSET];

		if (dcid_length < QS_CID_LENGTH_MIN || length < QS_LONG_DCID_OFFSET + dcid_length)
			return malformed;
		decision.outcome = QS_DISPATCHED;
		if (dcid_length == cid_length) {
			cid = qs_read_cid(head + QS_LONG_DCID_OFFSET, cid_length);
		} else {
			cid.message = qs_first_message(head + QS_LONG_DCID_OFFSET);
			cid.seal = 0;
			ours = 0;
		}
	} else {
		if (length < QS_SHORT_DCID_OFFSET + cid_length)
			return malformed;
		decision.outcome = QS_UNROUTABLE;
		cid = qs_read_cid(head + QS_SHORT_DCID_OFFSET, cid_length);
	}

	decision.hash = qs_siphash24(config->key0, config->key1, cid.message);
	if (ours) {
		const u32 slot = qs_open_seal(cid.seal, decision.hash);

		if (slot < config->slots) {
			decision.outcome = QS_ROUTED;
			decision.slot = slot;
		}
	}
	return decision;
}

/* The entry of the dispatch table for a hash. */
QS_INLINE u32 qs_table_index(u64 hash)
{
	return (u32)(hash >> 32) % QS_TABLE_SIZE;
}

#endif
