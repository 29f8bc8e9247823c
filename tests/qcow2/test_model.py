"""Any sequence of changes: the file has what a dictionary has, and nothing leaks."""

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    Bundle,
    RuleBasedStateMachine,
    consumes,
    initialize,
    invariant,
    multiple,
    rule,
)

from fleecefs.qcow2.container import Bitmap, Container
from fleecefs.units import KiB, MiB
from tests.qcow2.files import MemoryFile, bits, check, is_there, stored

SIZES = [512, 5 * KiB, 1 * MiB, 3 * MiB + 512, 70 * MiB]
GRANULARITIES = [512, 4 * KiB, 64 * KiB, 2048 * MiB]
CLUSTER_SIZES = [512, 4 * KiB, 64 * KiB]

names = st.text(
    st.characters(exclude_categories=["C", "Z"], codec="utf-8"), min_size=1, max_size=40
)


class Changes(RuleBasedStateMachine):
    """A container, and what should be in it."""

    bitmaps = Bundle("bitmaps")

    @initialize(
        size=st.sampled_from(SIZES), cluster_size=st.sampled_from(CLUSTER_SIZES)
    )
    def create(self, size, cluster_size):
        self.size = size
        self.file = MemoryFile()
        self.container = Container.create(self.file, size, cluster_size)
        self.model = {}

    @rule(
        target=bitmaps,
        name=names,
        granularity=st.sampled_from(GRANULARITIES),
        is_auto=st.booleans(),
    )
    def add(self, name, granularity, is_auto):
        if name in self.model:
            return multiple()
        dirty = bits(-(-self.size // granularity))
        self.store(Bitmap(name, granularity, dirty, is_auto))
        return name

    @rule(
        name=bitmaps,
        places=st.lists(st.tuples(st.floats(0, 1), st.integers(1, 9000)), max_size=3),
        value=st.integers(0, 1),
        in_use=st.booleans(),
        all_of_it=st.booleans(),
    )
    def change(self, name, places, value, in_use, all_of_it):
        bitmap = self.model[name]
        dirty = bitmap.bits.copy()
        changed = []
        for place, length in places:
            first = min(int(place * len(dirty)), len(dirty) - 1)
            end = min(first + length, len(dirty))
            dirty[first:end] = value
            changed.append((first, end))
        new = bitmap._replace(bits=dirty, is_in_use=in_use)
        self.store(new._replace(changed=None if all_of_it else changed))

    @rule(some=st.lists(bitmaps, max_size=3))
    def mark(self, some):
        if self.model:
            self.container.mark_in_use(some)
        for name in some:
            self.model[name] = self.model[name]._replace(is_in_use=True)

    @rule(name=consumes(bitmaps))
    def remove(self, name):
        self.container.update(remove=[name])
        del self.model[name]

    @rule()
    def reopen(self):
        self.container = Container.open(self.file)

    def store(self, bitmap):
        self.container.update([bitmap])
        self.model[bitmap.name] = bitmap

    @invariant()
    def file_is_as_it_should_be(self):
        if not hasattr(self, "model"):
            return
        expected = {name: is_there(bitmap) for name, bitmap in self.model.items()}
        assert stored(self.file) == expected
        assert check(self.file.content) == (0, 0)


TestChanges = Changes.TestCase
TestChanges.settings = settings(
    max_examples=60,
    stateful_step_count=20,
    deadline=None,
    derandomize=True,
    suppress_health_check=list(HealthCheck),
)
