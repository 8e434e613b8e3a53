/* SPDX-License-Identifier: MIT */
/*
 * SipHash-2-4 of exactly eight bytes (Aumasson and Bernstein, 2012).
 *
 * Compiled into the eBPF program, the extension and the tests, so it uses nothing but arithmetic.
 */
#ifndef QS_SIPHASH_H
#define QS_SIPHASH_H

#include "types.h"

struct qs_sip {
	u64 v0, v1, v2, v3;
};

QS_INLINE u64 qs_rotate_left(u64 value, u32 bits)
{
	return value << bits | value >> (64 - bits);
}

QS_INLINE void qs_sip_round(struct qs_sip *sip)
{
	sip->v0 += sip->v1;
	sip->v1 = qs_rotate_left(sip->v1, 13) ^ sip->v0;
	sip->v0 = qs_rotate_left(sip->v0, 32);
	sip->v2 += sip->v3;
	sip->v3 = qs_rotate_left(sip->v3, 16) ^ sip->v2;
	sip->v0 += sip->v3;
	sip->v3 = qs_rotate_left(sip->v3, 21) ^ sip->v0;
	sip->v2 += sip->v1;
	sip->v1 = qs_rotate_left(sip->v1, 17) ^ sip->v2;
	sip->v2 = qs_rotate_left(sip->v2, 32);
}

QS_INLINE void qs_sip_word(struct qs_sip *sip, u64 word)
{
	sip->v3 ^= word;
	qs_sip_round(sip);
	qs_sip_round(sip);
	sip->v0 ^= word;
}

/* `key0`, `key1` and `message` are the little-endian integers of their bytes. */
QS_INLINE u64 qs_siphash24(u64 key0, u64 key1, u64 message)
{
	struct qs_sip sip = {
		key0 ^ 0x736f6d6570736575ULL,
		key1 ^ 0x646f72616e646f6dULL,
		key0 ^ 0x6c7967656e657261ULL,
		key1 ^ 0x7465646279746573ULL,
	};

	qs_sip_word(&sip, message);
	qs_sip_word(&sip, (u64)QS_MESSAGE_LENGTH << 56);
	sip.v2 ^= 0xff;
	qs_sip_round(&sip);
	qs_sip_round(&sip);
	qs_sip_round(&sip);
	qs_sip_round(&sip);
	return sip.v0 ^ sip.v1 ^ sip.v2 ^ sip.v3;
}

#endif
