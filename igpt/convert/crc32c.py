"""CRC-32C (Castagnoli) of large buffers in numpy: about 0.2 GB/s on one core, without a compiled dependency.

A CRC is linear over GF(2), so that crc(AB) = zeros(crc(A), |B|) ^ crc(B), where zeros(s, n) is the register s after n
zero bytes, itself a linear map. A block is cut into LANES equal lanes whose registers advance together, 16 bits a
step; then neighbouring lanes are joined pairwise.
"""

from functools import lru_cache

import numpy as np

POLYNOMIAL = 0x82F63B78  # reflected
POWER = 7
LANE, LANES = 1 << POWER, 1 << 13  # bytes in a lane, and lanes at most
BLOCK = LANES * LANE


def crc32c(data) -> int:
    """The checksum of a contiguous buffer of bytes."""
    data = np.frombuffer(data, np.uint8)
    head = len(data) % BLOCK
    padded = np.zeros(LANE << max(0, head - 1 >> POWER).bit_length(), np.uint8)
    padded[len(padded) - head :] = data[:head]  # leading zeros leave a zero register zero
    state = _block(padded)
    for start in range(head, len(data), BLOCK):
        state = zeros(state, BLOCK) ^ _block(data[start : start + BLOCK])
    return int(state ^ zeros(np.uint32(0xFFFFFFFF), len(data)) ^ np.uint32(0xFFFFFFFF))


def masked(crc: int) -> int:
    """As stored beside data that may itself hold CRCs (LevelDB's and TensorFlow's convention)."""
    return (((crc >> 15) | (crc << 17)) + 0xA282EAD8) & 0xFFFFFFFF


def zeros(state, count: int):
    """The register after `count` zero bytes."""
    for power in range(count.bit_length()):
        if count >> power & 1:
            state = _apply(_zeros(power), state)
    return state


def _block(data: np.ndarray) -> np.uint32:
    """The register after LANE << n bytes, from zero."""
    words, step = data.view("<u2").reshape(-1, LANE // 2), _words()
    state = np.zeros(len(words), np.uint32)
    for column in range(LANE // 2):
        state ^= words[:, column]
        state = step[state & 0xFFFF] ^ (state >> 16)
    power = POWER
    while len(state) > 1:
        state = _apply(_zeros(power), state[::2]) ^ state[1::2]
        power += 1
    return state[0]


@lru_cache(1)
def _words() -> np.ndarray:
    """The register after the two bytes of each 16-bit word, from zero."""
    state = np.arange(1 << 16, dtype=np.uint32)
    for _ in range(16):
        state = (state >> 1) ^ np.where(state & 1, np.uint32(POLYNOMIAL), np.uint32(0))
    return state


@lru_cache(64)
def _zeros(power: int) -> np.ndarray:
    """The map of 2^power zero bytes as look-ups of the register's four bytes, (4, 256)."""
    units = np.uint32(1) << np.arange(32, dtype=np.uint32)
    if power == 0:
        images = _words()[(units & 0xFF) << 8] ^ (units >> 8)
    else:
        images = _apply(_zeros(power - 1), _apply(_zeros(power - 1), units))
    table = np.zeros((4, 1), np.uint32)
    for bit in range(8):
        table = np.concatenate([table, table ^ images.reshape(4, 8)[:, bit : bit + 1]], axis=1)
    return table


def _apply(table: np.ndarray, state):
    return table[0][state & 0xFF] ^ table[1][state >> 8 & 0xFF] ^ table[2][state >> 16 & 0xFF] ^ table[3][state >> 24]
