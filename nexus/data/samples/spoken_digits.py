"""Spoken digits made with espeak-ng: many voices, speeds and pitches, as trimmed 8 kHz OGG/Opus clips.

A voice is an accent of English with a variant (timbre). Splits share no variant, and no two variants of one family are in
different splits, so a test voice is heard nowhere else.
"""

from __future__ import annotations

import io
import subprocess

import numpy as np
import soundfile
from scipy.signal import resample_poly

SAMPLING_RATE = 8000
MAX_SECONDS = 0.8
DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
QUESTIONS = (
    "Which digit is spoken in this recording?",
    "What digit do you hear in the audio?",
    "Listen to the clip. Which number is said?",
    "What number does the voice say?",
    "Write the digit that you hear.",
    "Which number is spoken in the audio?",
)
ACCENTS = ("en-gb", "en-us", "en-gb-scotland", "en-gb-x-gbclan", "en-gb-x-rp", "en-gb-x-gbcwmd", "en-029", "en-us-nyc")
# espeak-ng 1.51's variants without whispers, robots and other effects; one string per family.
_FAMILIES = (
    "adam", "Alex", "Alicia", "Andrea", "Andy AnxiousAndy", "Annie", "antonio", "aunty", "belinda", "benjamin", "boris",
    "caleb", "david", "Denis", "Diogo", "ed", "edward edward2", "Gene Gene2", "Gustave", "Henrique", "Hugo",
    "iven iven2 iven3 iven4", "Jacky", "john", "kaukovalta", "Lee", "linda", "marcelo", "Marco", "Mario", "max", "Michael",
    "michel", "miguel", "mike", "Nguyen", "pablo", "paul", "pedro", "quincy", "rob robert", "sandro", "shelby",
    "steph steph2 steph3", "travis", "victor", "Zac", "anika", "f1", "f2", "f3", "f4", "f5", "m1", "m2", "m3", "m4", "m5",
    "m6", "m7", "m8", "grandma", "grandpa", "norbert",
)  # fmt: skip
_NUM_FAMILIES = {"teacher": 26, "student": 18, "test": 20}
# libsndfile's scale from 0 (best) to 1 (smallest); this gives about 9 kbit/s, which telephone speech survives.
_COMPRESSION_LEVEL = 0.96


def variants_of(split: str) -> list[str]:
    """Returns the espeak-ng variants of "teacher", "student" or "test"; no family is in two of them."""
    order = np.random.default_rng(0).permutation(len(_FAMILIES))
    ends = np.cumsum(list(_NUM_FAMILIES.values()))
    place = list(_NUM_FAMILIES).index(split)
    chosen = order[ends[place] - _NUM_FAMILIES[split] : ends[place]]
    return [variant for family in sorted(chosen) for variant in _FAMILIES[family].split()]


def synthesise(word: str, voice: str, words_per_minute: int, pitch: int) -> np.ndarray | None:
    """Returns float64 mono samples in [-1, 1] at 8 kHz without the silence around the word; None if longer than 0.8 s."""
    command = ["espeak-ng", "-v", voice, "-s", str(words_per_minute), "-p", str(pitch), "--stdout", word]
    spoken = subprocess.run(command, capture_output=True, check=True).stdout
    samples, rate = soundfile.read(io.BytesIO(spoken))
    factor = np.gcd(SAMPLING_RATE, rate)
    samples = resample_poly(samples, SAMPLING_RATE // factor, rate // factor)
    loud = np.flatnonzero(np.abs(samples) > 0.02 * np.abs(samples).max())
    samples = samples[max(0, loud[0] - 80) : loud[-1] + 80]
    if len(samples) > MAX_SECONDS * SAMPLING_RATE:
        return None
    return samples * (0.7 / np.abs(samples).max())


def encode_opus(samples: np.ndarray) -> bytes:
    """Returns 8 kHz mono samples as OGG/Opus bytes, the same bytes every time (libsndfile draws a random stream number)."""
    buffer = io.BytesIO()
    soundfile.write(buffer, samples, SAMPLING_RATE, format="OGG", subtype="OPUS", compression_level=_COMPRESSION_LEVEL)
    return _with_serial_number(buffer.getvalue(), 1)


def _with_serial_number(ogg: bytes, serial: int) -> bytes:
    """Sets the stream number of every OGG page and renews the page's checksum (RFC 3533, section 6)."""
    pages = []
    start = 0
    while start < len(ogg):
        num_segments = ogg[start + 26]
        end = start + 27 + num_segments + sum(ogg[start + 27 : start + 27 + num_segments])
        page = bytearray(ogg[start:end])
        page[14:18] = serial.to_bytes(4, "little")
        page[22:26] = bytes(4)
        page[22:26] = _ogg_checksum(page).to_bytes(4, "little")
        pages.append(bytes(page))
        start = end
    return b"".join(pages)


def _ogg_checksum(page: bytearray) -> int:
    checksum = 0
    for byte in page:
        checksum = ((checksum << 8) & 0xFFFFFFFF) ^ _CHECKSUM_TABLE[(checksum >> 24) ^ byte]
    return checksum


def _checksum_row(byte: int) -> int:
    value = byte << 24
    for _ in range(8):
        value = ((value << 1) ^ 0x04C11DB7 if value & 0x80000000 else value << 1) & 0xFFFFFFFF
    return value


_CHECKSUM_TABLE = tuple(_checksum_row(byte) for byte in range(256))
