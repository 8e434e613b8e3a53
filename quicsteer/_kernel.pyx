# SPDX-License-Identifier: MIT
"""The boundary to the kernel and to the C decision: one function per C call, errors turned into exceptions."""

from libc.stdint cimport uint32_t, uint64_t
from libc.stdlib cimport free, malloc

from .errors import KernelError


cdef extern from "abi.h":
    enum:
        QS_CID_LENGTH_MAX
        QS_CID_LENGTH_MIN
        QS_KEY_LENGTH
        QS_MESSAGE_LENGTH
        QS_NO_SLOT
        QS_OUTCOMES
        QS_SEAL_LENGTH

cdef extern from "result.h":
    struct qs_result:
        int value
        int error
        const char *call

cdef extern from "decide.h":
    struct qs_config:
        uint64_t key0
        uint64_t key1
        uint32_t cid_length
        uint32_t listeners
        uint32_t slots
        uint32_t drop_invalid

    struct qs_cid:
        uint64_t message
        uint32_t seal

    struct qs_decision:
        uint32_t outcome
        uint32_t slot
        uint64_t hash

    uint64_t qs_siphash24(uint64_t key0, uint64_t key1, uint64_t message) nogil
    uint32_t qs_seal(uint32_t slot, uint64_t hash) nogil
    uint32_t qs_open_seal(uint32_t seal, uint64_t hash) nogil
    qs_cid qs_read_cid(const unsigned char *cid, uint32_t length) nogil

cdef extern from "sockets.h":
    struct qs_classic:
        pass

    struct qs_meminfo:
        uint32_t queued
        uint32_t buffer
        uint32_t dropped

    qs_result qs_close_filter(int fd)
    qs_result qs_open_filter(int fd)
    qs_result qs_attach_classic(int fd, const qs_classic *program, uint32_t length)
    qs_result qs_attach_program(int fd, int program)
    qs_result qs_read_meminfo(int fd, qs_meminfo *info)

cdef extern from "loader.h":
    struct qs_program:
        int program
        int sockets
        int table
        int counters

    struct qs_bpf_answers:
        int bad_pointer
        int bad_command
        int array
        int socket_array
        int program
        int signal

    qs_result qs_load_program(const qs_config *config, qs_program *program, char *log, uint32_t log_size) nogil
    qs_result qs_set_socket(int sockets, uint32_t slot, int fd)
    qs_result qs_set_listener(int table, uint32_t index, uint32_t slot)
    qs_result qs_read_counters(int counters, uint32_t slot, uint64_t *sums)
    qs_result qs_probe_bpf(qs_bpf_answers *answers) nogil

cdef extern from "trace.h":
    qs_result qs_make_counts(uint32_t entries)
    qs_result qs_load_tracing(const void *instructions, uint32_t count) nogil
    qs_result qs_open_tracepoint(int program, const char *name) nogil
    qs_result qs_read_count(int counts, uint32_t key, uint64_t *count)

cdef extern from "spawn.h":
    struct qs_spawn_request "qs_spawn":
        const char *path
        char **arguments
        char **environment
        const int *descriptors
        uint32_t descriptor_count
        unsigned int uid
        unsigned int gid
        uint64_t ignored

    enum:
        QS_KEEP_ID

    qs_result qs_spawn(const qs_spawn_request *spawn) nogil

cdef enum:
    LOG_SIZE = 2048
    CLASSIC_LENGTH = 8
    INSTRUCTION_LENGTH = 8


cdef int check(qs_result result, str detail="") except -1:
    if result.error:
        raise KernelError(result.error, (<bytes>result.call).decode(), detail)
    return result.value


cdef uint64_t little_endian(const unsigned char *bytes8) noexcept:
    cdef uint64_t value = 0
    cdef int i
    for i in range(8):
        value |= <uint64_t>bytes8[i] << 8 * i
    return value


cdef uint64_t keyed_hash(bytes key, uint64_t message) except? 0:
    if len(key) != QS_KEY_LENGTH:
        raise ValueError(f"key has {len(key)} bytes, it must have {QS_KEY_LENGTH}")
    cdef const unsigned char *raw = key
    return qs_siphash24(little_endian(raw), little_endian(raw + 8), message)


cdef qs_cid split_cid(bytes cid) except *:
    cdef Py_ssize_t length = len(cid)
    if not QS_CID_LENGTH_MIN <= length <= QS_CID_LENGTH_MAX:
        raise ValueError(f"a connection ID has {QS_CID_LENGTH_MIN} to {QS_CID_LENGTH_MAX} bytes, not {length}")
    return qs_read_cid(cid, <uint32_t>length)


def siphash24(bytes key not None, bytes message not None):
    if len(message) != QS_MESSAGE_LENGTH:
        raise ValueError(f"message has {len(message)} bytes, it must have {QS_MESSAGE_LENGTH}")
    return keyed_hash(key, little_endian(message))


def seal(bytes key not None, bytes body not None, uint32_t slot):
    cdef qs_cid parts = split_cid(body + bytes(QS_SEAL_LENGTH))
    return body + qs_seal(slot, keyed_hash(key, parts.message)).to_bytes(QS_SEAL_LENGTH, "big")


def open_seal(bytes key not None, bytes cid not None):
    cdef qs_cid parts = split_cid(cid)
    cdef uint32_t slot = qs_open_seal(parts.seal, keyed_hash(key, parts.message))
    return None if slot == QS_NO_SLOT else slot


def close_filter(int fd):
    check(qs_close_filter(fd))


def open_filter(int fd):
    check(qs_open_filter(fd))


def attach_classic(int fd, bytes program not None):
    cdef uint32_t length = <uint32_t>(len(program) // CLASSIC_LENGTH)
    check(qs_attach_classic(fd, <const qs_classic *><const unsigned char *>program, length))


def attach_program(int fd, int program):
    check(qs_attach_program(fd, program))


def read_meminfo(int fd):
    cdef qs_meminfo info
    check(qs_read_meminfo(fd, &info))
    return info.queued, info.buffer, info.dropped


def load_program(bytes key not None, uint32_t cid_length, uint32_t listeners, uint32_t slots, bint drop_invalid):
    cdef const unsigned char *raw = key
    cdef qs_config config
    cdef qs_program program
    cdef qs_result result
    cdef char log[LOG_SIZE]
    if len(key) != QS_KEY_LENGTH:
        raise ValueError(f"key has {len(key)} bytes, it must have {QS_KEY_LENGTH}")
    config.key0 = little_endian(raw)
    config.key1 = little_endian(raw + 8)
    config.cid_length = cid_length
    config.listeners = listeners
    config.slots = slots
    config.drop_invalid = drop_invalid
    with nogil:
        result = qs_load_program(&config, &program, log, LOG_SIZE)
    check(result, (<bytes>log).decode("utf-8", "replace"))
    return program.program, program.sockets, program.table, program.counters


def set_socket(int sockets, uint32_t slot, int fd):
    check(qs_set_socket(sockets, slot, fd))


def set_listener(int table, uint32_t index, uint32_t slot):
    check(qs_set_listener(table, index, slot))


def read_counters(int counters, uint32_t slot):
    cdef uint64_t sums[QS_OUTCOMES]
    check(qs_read_counters(counters, slot, sums))
    return tuple([sums[i] for i in range(QS_OUTCOMES)])


def make_counts(uint32_t entries):
    return check(qs_make_counts(entries))


def load_tracing(bytes instructions not None):
    cdef const unsigned char *raw = instructions
    cdef uint32_t count = <uint32_t>(len(instructions) // INSTRUCTION_LENGTH)
    cdef qs_result result
    with nogil:
        result = qs_load_tracing(raw, count)
    return check(result)


def open_tracepoint(int program, bytes name not None):
    cdef const char *text = name
    cdef qs_result result
    with nogil:
        result = qs_open_tracepoint(program, text)
    return check(result)


def read_count(int counts, uint32_t key):
    cdef uint64_t count
    check(qs_read_count(counts, key, &count))
    return count


def probe_bpf():
    cdef qs_bpf_answers answers
    cdef qs_result result
    with nogil:
        result = qs_probe_bpf(&answers)
    check(result)
    return {
        "bad_pointer": answers.bad_pointer,
        "bad_command": answers.bad_command,
        "array": answers.array,
        "socket_array": answers.socket_array,
        "program": answers.program,
        "signal": answers.signal,
    }


cdef char **strings(list values) except NULL:
    cdef Py_ssize_t count = len(values), i
    cdef bytes value
    cdef char **result = <char **>malloc((count + 1) * sizeof(char *))
    if result == NULL:
        raise MemoryError
    for i in range(count):
        value = values[i]
        result[i] = value
    result[count] = NULL
    return result


def spawn(bytes path not None, list arguments not None, list environment not None, tuple descriptors not None,
          uid=None, gid=None, tuple ignored=()):
    cdef qs_spawn_request request
    cdef qs_result result
    cdef int *numbers = NULL
    cdef char **argument_strings = NULL
    cdef char **environment_strings = NULL
    for entry in [path, *arguments, *environment]:
        if not isinstance(entry, bytes):
            raise TypeError(f"expected bytes, got {type(entry).__name__}")
        if b"\0" in entry:
            raise ValueError("a string for another program ends at its first zero byte: it may have none")
    try:
        argument_strings = strings(arguments)
        environment_strings = strings(environment)
        numbers = <int *>malloc((len(descriptors) + 1) * sizeof(int))
        if numbers == NULL:
            raise MemoryError
        for i, number in enumerate(descriptors):
            numbers[i] = number
        request.path = path
        request.arguments = argument_strings
        request.environment = environment_strings
        request.descriptors = numbers
        request.descriptor_count = <uint32_t>len(descriptors)
        request.uid = QS_KEEP_ID if uid is None else uid
        request.gid = QS_KEEP_ID if gid is None else gid
        request.ignored = 0
        for number in ignored:
            request.ignored |= <uint64_t>1 << <int>number
        with nogil:
            result = qs_spawn(&request)
        return check(result)
    finally:
        free(argument_strings)
        free(environment_strings)
        free(numbers)
