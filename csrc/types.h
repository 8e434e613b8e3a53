/* SPDX-License-Identifier: MIT */
/* Integer names that the kernel and user space share. */
#ifndef QS_TYPES_H
#define QS_TYPES_H

#include "abi.h"

#ifdef __bpf__
#include <linux/types.h>
typedef __u8 u8;
typedef __u16 u16;
typedef __u32 u32;
typedef __u64 u64;
#else
#include <stdint.h>
typedef uint8_t u8;
typedef uint16_t u16;
typedef uint32_t u32;
typedef uint64_t u64;
#endif

#define QS_INLINE static inline __attribute__((always_inline))

#endif
