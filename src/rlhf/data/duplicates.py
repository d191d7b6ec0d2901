"""Near-duplicate prompts: by a common beginning, as InstructGPT removed them, and by MinHash.

`PromptIndex` keeps the prompts' text in normal form and some 300 bytes beside it, so that a million prompts fit in a laptop's
memory. Signatures are datasketch's MinHash; its LSH tables (dicts of sets, some kilobytes a prompt) are arrays here.
"""

import re
import unicodedata
import zlib
from dataclasses import dataclass
from functools import cached_property, lru_cache
from itertools import islice

import numpy as np
from datasketch import MinHash, MinHashLSH
from sortedcontainers import SortedList

LONG_PREFIX, LONG_SHARE = 200, 0.9  # characters that two long prompts share, and how much of the longer they are
SUCCESSORS = 64  # kept prompts looked at that begin with a whole new one
CANDIDATES = 64  # kept prompts looked at that share a band of the signature
PERMUTATIONS = 64
SHINGLE = 3  # words; Key.shingles is written for three
MISSED, CHANCE = 0.9, 0.1  # weights of the two errors that bands are chosen by: a candidate by chance only costs time
ROLE_MARK = re.compile(r"\n\W{0,9}\w[\w; ]{0,20}:\s{0,9}\Z")  # a last line like "Assistant:" or "### Response:"

# Scripts that are written without spaces (Chinese, Japanese, Thai, Lao, Burmese, Khmer): each character is a word.
UNSPACED = (
    "\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3005-\u3007\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\uff66-\uff9d"
    "\U00020000-\U0003ffff"
)
WORD = re.compile(rf"[{UNSPACED}]|[^\W{UNSPACED}]+|[^\w\s]")  # words and marks

MINHASH = MinHash(num_perm=PERMUTATIONS, seed=1, hashfunc=int)
WEIGHTS = np.random.default_rng(0).integers(2**63, size=PERMUTATIONS, dtype=np.uint64) * 2 + 1
_POWERS: np.ndarray = np.ones(1, dtype=np.uint64)


def normalised(text: str) -> str:
    """Words and marks in small letters with one space between, without a last line that only says whose turn it is."""
    text = ROLE_MARK.sub("", text)
    text = text if text.isascii() else unicodedata.normalize("NFKC", text)
    return " ".join(WORD.findall(text.casefold()))


@dataclass(frozen=True)
class Key:
    """A prompt as it is compared. All of it follows from `text`, and is worked out when it is first asked for."""

    text: str  # in normal form

    @cached_property
    def beginnings(self) -> tuple[np.ndarray, np.ndarray]:
        """(ends, digests) of each beginning that ends with a word; the last is the whole text's. Each [words]."""
        words = self.text.split(" ")
        ends = np.cumsum(np.fromiter(map(len, words), dtype=np.int64, count=len(words)) + 1) - 1
        hashes = np.fromiter(map(hash, words), dtype=np.int64, count=len(words)).view(np.uint64)
        return ends, np.cumsum((hashes + np.uint64(1)) * _powers(len(words)))

    @cached_property
    def digest(self) -> int:
        return int(self.beginnings[1][-1])

    @cached_property
    def shingles(self) -> list[int]:
        """Its word triples as numbers of 32 bits."""
        sums = list(map(zlib.crc32, self.text.encode().split(b" ")))
        sums += [0] * (SHINGLE - len(sums))
        words = np.array(sums, dtype=np.uint64)
        mixed = words[:-2] * WEIGHTS[0] + words[1:-1] * WEIGHTS[1] + words[2:] * WEIGHTS[2]
        return (mixed >> np.uint64(32)).tolist()

    @cached_property
    def signature(self) -> np.ndarray:
        """MinHash values [PERMUTATIONS] uint32."""
        MINHASH.clear()
        MINHASH.update_batch(self.shingles)
        return MINHASH.hashvalues


@lru_cache(maxsize=4)  # one step looks a prompt up, another adds it
def key_of(text: str) -> Key:
    return Key(normalised(text))


def _powers(count: int) -> np.ndarray:
    """1, p, p² … modulo 2⁶⁴, [count]."""
    global _POWERS
    if len(_POWERS) < count:
        _POWERS = np.cumprod(np.full(2 * count, WEIGHTS[-1], dtype=np.uint64))
    return _POWERS[:count]


class PromptIndex:
    """The prompts kept so far, and why another one is a near-duplicate: "same", "prefix", "minhash", or None.

    prefix:  one prompt begins with the whole of the other, which is at least this share of it; or both are long (200
             characters) and nine tenths of the longer are the same beginning. Prompts made from templates have long
             beginnings in common and are different questions, so a common beginning alone does not count.
    minhash: Jaccard similarity of the sets of word triples, from candidates of MinHash LSH, computed exactly.
    """

    def __init__(self, prefix: float, minhash: float):
        self.prefix, self.minhash = prefix, minhash
        self.ordered: SortedList = SortedList()
        self.wholes: set[int] = set()
        self.bands = Bands(minhash) if minhash else None

    def add(self, text: str) -> None:
        key = key_of(text)
        if key.digest in self.wholes:
            return
        self.wholes.add(key.digest)
        if self.prefix:
            self.ordered.add(key.text)
        if self.bands is not None:
            self.bands.add(key)

    def match(self, text: str) -> str | None:
        if not self.wholes:
            return None
        key = key_of(text)
        if key.digest in self.wholes:
            return "same"
        if self.prefix and (self._begins_or_begun(key) or self._long_beginning(key.text)):
            return "prefix"
        return "minhash" if self.bands is not None and self.bands.has_similar(key) else None

    def _begins_or_begun(self, key: Key) -> bool:
        ends, digests = key.beginnings
        first = int(np.searchsorted(ends, self.prefix * len(key.text)))
        if not self.wholes.isdisjoint(digests[first:].tolist()):
            return True
        for longer in islice(self.ordered.irange(key.text + " "), SUCCESSORS):
            if not longer.startswith(key.text + " "):
                return False
            if len(key.text) >= self.prefix * len(longer):
                return True
        return False

    def _long_beginning(self, text: str) -> bool:
        """Of all kept ones, those beside it in sorted order share the longest beginning."""
        if len(text) < LONG_PREFIX:
            return False
        after = self.ordered.irange(text)
        before = self.ordered.irange(None, text, reverse=True)
        for other in (*islice(before, 1), *islice(after, 1)):
            share = max(LONG_PREFIX, -int(-LONG_SHARE * max(len(text), len(other)) // 1))
            if text[:share] == other[:share] and min(len(text), len(other)) >= share:
                return True
        return False


class Bands:
    """MinHash LSH: kept prompts by hashes of bands of their signatures.

    A band of a prompt is an entry, numbered prompt * bands + band. Entries whose hashes fall into one slot are a chain:
    `heads` has the newest of each slot, `nexts` the one before each. Slots are twice as many as entries.
    """

    def __init__(self, threshold: float):
        # A little below, since LSH misses some that lie just above its own threshold.
        lsh = MinHashLSH(threshold=0.9 * threshold, num_perm=PERMUTATIONS, weights=(CHANCE, MISSED))
        self.threshold, self.count, self.rows = threshold, lsh.b, lsh.r
        self.texts: list[str] = []
        self.hashes = np.zeros((0, self.count), dtype=np.uint32)
        self.nexts = np.zeros((0, self.count), dtype=np.int32)
        self.heads = np.zeros(0, dtype=np.int32)
        self.hashed: tuple[Key, np.ndarray] | None = None
        self.salts = np.arange(self.count, dtype=np.uint64) * WEIGHTS[-2]

    def add(self, key: Key) -> None:
        place = len(self.texts)
        if place == len(self.hashes):
            self._grow()
        hashes = self._band_hashes(key)
        self.texts.append(key.text)
        self.hashes[place] = hashes
        for band, slot in enumerate((hashes & np.uint32(len(self.heads) - 1)).tolist()):
            self.nexts[place, band] = self.heads[slot]
            self.heads[slot] = place * self.count + band

    def has_similar(self, key: Key) -> bool:
        if not self.texts:
            return False
        hashes = self._band_hashes(key)
        entries, seen = self.heads[hashes & np.uint32(len(self.heads) - 1)], set[int]()
        flat, nexts = self.hashes.reshape(-1), self.nexts.reshape(-1)
        while len(entries := entries[there := entries >= 0]) and len(seen) < CANDIDATES:
            hashes = hashes[there]
            for place in (entries[flat[entries] == hashes] // self.count).tolist():
                if place not in seen and self._is_similar(key, Key(self.texts[place])):
                    return True
                seen.add(place)
            entries = nexts[entries]
        return False

    def _is_similar(self, key: Key, other: Key) -> bool:
        mine, theirs = set(key.shingles), set(other.shingles)
        common = len(mine & theirs)
        return common >= self.threshold * (len(mine) + len(theirs) - common)

    def _band_hashes(self, key: Key) -> np.ndarray:
        if self.hashed is None or self.hashed[0] is not key:  # a prompt that is looked up is mostly added next
            self.hashed = key, self._hashes_of(key)
        return self.hashed[1]

    def _hashes_of(self, key: Key) -> np.ndarray:
        used = self.count * self.rows
        values = (key.signature[:used] * WEIGHTS[:used]).reshape(self.count, self.rows)
        return ((np.add.reduce(values, axis=1) + self.salts) >> np.uint64(32)).astype(np.uint32)

    def _grow(self) -> None:
        size = max(1024, 2 * len(self.hashes))
        self.hashes = np.concatenate([self.hashes, np.zeros((size - len(self.hashes), self.count), dtype=np.uint32)])
        slots = 1 << (2 * size * self.count - 1).bit_length()
        taken = self.hashes[: len(self.texts)].reshape(-1) & np.uint32(slots - 1)
        order = np.argsort(taken, kind="stable").astype(np.int32)
        taken = taken[order]
        follows = taken[1:] == taken[:-1]
        self.heads = np.full(slots, -1, dtype=np.int32)
        last = np.append(~follows, True)[: len(order)]
        self.heads[taken[last]] = order[last]
        self.nexts = np.full((size, self.count), -1, dtype=np.int32)
        self.nexts.reshape(-1)[order[1:][follows]] = order[:-1][follows]
