// SPDX-License-Identifier: MIT
/*
 * How other servers steer, written anew from the rules that they publish, and the program that does nothing.
 *
 * docs/benchmarks.md says where a rule comes from and what is simpler here. Data begins at the UDP header; offsets
 * below count from the payload.
 */
#include <linux/bpf.h>
#include <linux/udp.h>

#include <bpf/bpf_endian.h>
#include <bpf/bpf_helpers.h>

enum {
	PAYLOAD = sizeof(struct udphdr),
	LONG_HEADER = 0x80,
	SHORT_DCID = 1,
	LONG_DCID_LENGTH = 5,
	LONG_DCID = 6,
	SOCKETS_MAX = 1024,
};

typedef __u8 u8;
typedef __u32 u32;
typedef __u64 u64;

char _license[] SEC("license") = "Dual MIT/GPL";

SEC("sk_reuseport")
int pass(struct sk_reuseport_md *md)
{
	return SK_PASS;
}

/* nginx: the first 8 bytes of a DCID are the cookie of the worker's socket; without one, the kernel chooses. */

struct {
	__uint(type, BPF_MAP_TYPE_SOCKHASH);
	__type(key, u64);
	__type(value, u64);
	__uint(max_entries, 4 * SOCKETS_MAX);
} nginx_sockets SEC(".maps");

enum { NGINX_CID_LENGTH = 20, COOKIE_LENGTH = 8 };

SEC("sk_reuseport")
int nginx(struct sk_reuseport_md *md)
{
	const u8 *payload = (const u8 *)md->data + PAYLOAD, *end = md->data_end, *dcid;
	u64 key;

	if (payload + 1 > end)
		return SK_PASS;
	if (payload[0] & LONG_HEADER) {
		dcid = payload + LONG_DCID;
		if (dcid + COOKIE_LENGTH > end || payload[LONG_DCID_LENGTH] < COOKIE_LENGTH)
			return SK_PASS;
	} else {
		dcid = payload + SHORT_DCID;
		if (dcid + NGINX_CID_LENGTH > end)
			return SK_PASS;
	}
	key = bpf_be64_to_cpu(*(const u64 *)dcid);
	bpf_sk_select_reuseport(md, &nginx_sockets, &key, 0);
	return SK_PASS;
}

/*
 * udpgrm: the first 2 bytes of a DCID are a cookie of generation, index and checksum; from these to a socket's cookie,
 * and from that to the socket. Who has none is new and goes to a socket of the working generation by the flow's hash.
 */

enum { UDPGRM_INDEX_MAX = 256, UDPGRM_GENERATIONS = 32, UDPGRM_LONG_CID_LENGTH = 16 };

struct udpgrm_state {
	u32 working, sockets; /* generation for new flows, and its size */
	u64 known, fresh, errors;
};

struct udpgrm_key {
	u32 family, address, port;
};

struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__type(key, struct udpgrm_key);
	__type(value, struct udpgrm_state);
	__uint(max_entries, 512);
} udpgrm_groups SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__type(key, u32);
	__type(value, u64);
	__uint(max_entries, UDPGRM_GENERATIONS *UDPGRM_INDEX_MAX);
} udpgrm_cookies SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_SOCKHASH);
	__type(key, u64);
	__type(value, u64);
	__uint(max_entries, UDPGRM_GENERATIONS *UDPGRM_INDEX_MAX);
} udpgrm_sockets SEC(".maps");

static __always_inline int udpgrm_select(struct sk_reuseport_md *md, u32 place)
{
	u64 *cookie = bpf_map_lookup_elem(&udpgrm_cookies, &place);

	return cookie ? bpf_sk_select_reuseport(md, &udpgrm_sockets, cookie, 0) : -1;
}

/* Return where a cookie points to, or -1 when its checksum is wrong. */
static __always_inline int udpgrm_place(u32 cookie)
{
	u32 generation = cookie & 31, check = cookie >> 5 & 7, index = cookie >> 8;
	u32 folded = 0xd ^ (index & 15) ^ index >> 4 ^ (generation & 15) ^ generation >> 4;

	if (check != ((folded & 7) ^ folded >> 3))
		return -1;
	return (int)(generation * UDPGRM_INDEX_MAX + index);
}

static __always_inline int udpgrm_read(struct sk_reuseport_md *md)
{
	u8 head[LONG_DCID + 2];

	if (bpf_skb_load_bytes(md, PAYLOAD, head, sizeof(head)))
		return -1;
	if (!(head[0] & LONG_HEADER))
		return udpgrm_place((u32)head[SHORT_DCID] << 8 | head[SHORT_DCID + 1]);
	if (head[LONG_DCID_LENGTH] != UDPGRM_LONG_CID_LENGTH)
		return -1;
	return udpgrm_place((u32)head[LONG_DCID] << 8 | head[LONG_DCID + 1]);
}

SEC("sk_reuseport")
int udpgrm(struct sk_reuseport_md *md)
{
	struct udpgrm_key key = {md->eth_protocol, md->bind_inany, md->ip_protocol};
	struct udpgrm_state *state = bpf_map_lookup_elem(&udpgrm_groups, &key);
	int place = udpgrm_read(md);

	if (!state || !state->sockets)
		return SK_PASS;
	if (place >= 0 && !udpgrm_select(md, (u32)place)) {
		__sync_fetch_and_add(&state->known, 1);
		return SK_PASS;
	}
	__sync_fetch_and_add(&state->fresh, 1);
	if (udpgrm_select(md, (state->working & 31) * UDPGRM_INDEX_MAX + md->hash % state->sockets))
		__sync_fetch_and_add(&state->errors, 1);
	return SK_PASS;
}

/*
 * nghttpx: a CID is a random byte and one AES-128 block that starts with the worker's identifier. Others go by a hash
 * of the DCID that the flow's hash seeds. The tables of the cipher come from user space (FIPS 197, equivalent inverse
 * cipher).
 */

enum {
	AES_ROUNDS = 10,
	NGHTTPX_CID_LENGTH = 17,
	NGHTTPX_SHORTEST = 22,
	DCID_MIN = 8,
	DCID_MAX = 20,
	TYPE_MASK = 0x30,
	TYPE_INITIAL = 0x00,
	TYPE_0_RTT = 0x10,
	TYPE_HANDSHAKE = 0x20,
};

struct aes {
	u32 keys[4 * (AES_ROUNDS + 1)];
	u32 tables[4][256];
	u8 inverse[256];
	u32 workers;
};

struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__type(key, u32);
	__type(value, struct aes);
	__uint(max_entries, 1);
} nghttpx_aes SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__type(key, u64);
	__type(value, u32);
	__uint(max_entries, SOCKETS_MAX);
} nghttpx_workers SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_REUSEPORT_SOCKARRAY);
	__type(key, u32);
	__type(value, u64);
	__uint(max_entries, SOCKETS_MAX);
} nghttpx_sockets SEC(".maps");

/* One column of a round: bytes of four columns, each through its table. */
static __always_inline u32 aes_mix(const struct aes *aes, u32 a, u32 b, u32 c, u32 d, u32 key)
{
	return aes->tables[0][a >> 24] ^ aes->tables[1][b >> 16 & 255] ^ aes->tables[2][c >> 8 & 255] ^
	       aes->tables[3][d & 255] ^ key;
}

static __always_inline u32 aes_last(const struct aes *aes, u32 a, u32 b, u32 c, u32 d, u32 key)
{
	return ((u32)aes->inverse[a >> 24] << 24 | (u32)aes->inverse[b >> 16 & 255] << 16 |
		(u32)aes->inverse[c >> 8 & 255] << 8 | aes->inverse[d & 255]) ^
	       key;
}

/* Decrypt a block, of which the first half is of interest. */
static __always_inline u64 aes_decrypt(const struct aes *aes, const u8 *block)
{
	u32 state[4], next[4];

	for (int i = 0; i < 4; i++)
		state[i] = ((u32)block[4 * i] << 24 | (u32)block[4 * i + 1] << 16 | (u32)block[4 * i + 2] << 8 |
			    block[4 * i + 3]) ^
			   aes->keys[i];
#pragma unroll
	for (int round = 1; round < AES_ROUNDS; round++) {
#pragma unroll
		for (int i = 0; i < 4; i++)
			next[i] = aes_mix(aes, state[i], state[(i + 3) & 3], state[(i + 2) & 3], state[(i + 1) & 3],
					  aes->keys[4 * round + i]);
		state[0] = next[0];
		state[1] = next[1];
		state[2] = next[2];
		state[3] = next[3];
	}
	for (int i = 0; i < 2; i++)
		next[i] = aes_last(aes, state[i], state[(i + 3) & 3], state[(i + 2) & 3], state[(i + 1) & 3],
				   aes->keys[4 * AES_ROUNDS + i]);
	return (u64)next[0] << 32 | next[1];
}

static __always_inline u32 rotate(u32 word, u32 bits)
{
	return word << bits | word >> (32 - bits);
}

/* Jenkins' lookup3, its final mixing over two words. */
static __always_inline u32 jenkins(u32 a, u32 b, u32 seed)
{
	u32 c = seed + 0xdeadbeef + 8;

	a += c;
	b += c;
	c = (c ^ b) - rotate(b, 14);
	a = (a ^ c) - rotate(c, 11);
	b = (b ^ a) - rotate(a, 25);
	c = (c ^ b) - rotate(b, 16);
	a = (a ^ c) - rotate(c, 4);
	b = (b ^ a) - rotate(a, 14);
	return (c ^ b) - rotate(b, 24);
}

/* A DCID of 8 to 20 bytes, padded with zeros, in pieces of 8 from its end. */
static __always_inline u32 nghttpx_hash(const u32 *words, u32 length, u32 seed)
{
	u32 hash = seed;

	if (length > 16)
		hash = jenkins(words[4], 0, hash);
	if (length > 8)
		hash = jenkins(words[2], words[3], hash);
	return jenkins(words[0], words[1], hash);
}

static __always_inline int nghttpx_is_foul(u32 port)
{
	return port < 1024 || port == 1900 || port == 5353 || port == 11211 || port == 20800 || port == 27015;
}

SEC("sk_reuseport")
int nghttpx(struct sk_reuseport_md *md)
{
	const struct udphdr *udp = md->data;
	u8 head[NGHTTPX_SHORTEST], type;
	union {
		u8 bytes[24];
		u32 words[6];
	} dcid = {};
	const struct aes *aes;
	u32 zero = 0, length, index, *known;
	u64 worker;

	if ((const void *)(udp + 1) > md->data_end || nghttpx_is_foul(bpf_ntohs(udp->source)))
		return SK_DROP;
	if (md->len < PAYLOAD + NGHTTPX_SHORTEST || bpf_skb_load_bytes(md, PAYLOAD, head, sizeof(head)))
		return SK_DROP;
	aes = bpf_map_lookup_elem(&nghttpx_aes, &zero);
	if (!aes || !aes->workers)
		return SK_DROP;
	if (head[0] & LONG_HEADER) {
		length = head[LONG_DCID_LENGTH];
		if (length < DCID_MIN || length > DCID_MAX)
			return SK_DROP;
		if (bpf_skb_load_bytes(md, PAYLOAD + LONG_DCID, dcid.bytes, length))
			return SK_DROP;
		type = head[0] & TYPE_MASK;
		if (type != TYPE_INITIAL && type != TYPE_0_RTT &&
		    (type != TYPE_HANDSHAKE || length != NGHTTPX_CID_LENGTH))
			return SK_DROP;
	} else {
		length = NGHTTPX_CID_LENGTH;
		__builtin_memcpy(dcid.bytes, head + SHORT_DCID, NGHTTPX_CID_LENGTH);
	}
	if (length == NGHTTPX_CID_LENGTH) {
		worker = aes_decrypt(aes, dcid.bytes + 1);
		known = bpf_map_lookup_elem(&nghttpx_workers, &worker);
		if (known && !bpf_sk_select_reuseport(md, &nghttpx_sockets, known, 0))
			return SK_PASS;
	}
	index = nghttpx_hash(dcid.words, length, md->hash) % aes->workers;
	return bpf_sk_select_reuseport(md, &nghttpx_sockets, &index, 0) ? SK_DROP : SK_PASS;
}
