"""How long data are on the way between the devices of a topology."""

import dataclasses
from collections import Counter
from collections.abc import Sequence

from repo_jax.hardware import Chip
from repo_jax.planning.cost import Collective

Coordinates = tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class Links:
    """The links between devices.

    Attributes:
      chip: of all devices.
      coordinates: of each device in a TPU's torus, in the order of the mesh; of a GPU its
        machine and its number there.
    """

    chip: Chip
    coordinates: tuple[Coordinates, ...]

    @property
    def lengths(self) -> Coordinates:
        """Of the topology's axes."""
        return tuple(max(column) + 1 for column in zip(*self.coordinates, strict=True))

    @property
    def rings(self) -> tuple[bool, ...]:
        """Which axes of the torus are closed. With three axes, all or none."""
        closed = [length % self.chip.ring == 0 for length in self.lengths]
        if self.chip.axes == 3:
            return (all(closed),) * len(closed)
        return tuple(closed)

    def seconds(self, collective: Collective) -> float:
        """If all links in use are busy from start to end, without latencies.

        A collective of a group uses all axes of the torus that the group extends over: both
        directions of a ring, but of a line only one, since the device at its end has one link.
        A collective-permute takes the shortest way along one axis after the other; the busiest
        link decides.
        """
        if collective.kind == "collective-permute":
            return collective.sent / self.chip.link * self._busiest(collective.groups)
        return collective.sent / min(map(self._bandwidth, collective.groups), default=1.0)

    def _bandwidth(self, group: Sequence[int]) -> float:
        if len(group) == 1:
            return float("inf")
        places = [self.coordinates[device] for device in group]
        spans = [len(set(column)) for column in zip(*places, strict=True)]
        if not self.chip.axes:
            # As many rings leave a machine as GPUs of it take part, each by its own network.
            beyond = self.chip.network * spans[1]
            return min(self.chip.link, beyond) if spans[0] > 1 else self.chip.link
        links = 0
        for span, length, ring in zip(spans, self.lengths, self.rings, strict=True):
            if span > 1:
                links += 2 if ring and span == length else 1
        return self.chip.link * links

    def _busiest(self, pairs: Sequence[tuple[int, ...]]) -> float:
        """The most transfers over one link, one transfer being the unit."""
        used: Counter = Counter()
        for source, target in pairs:
            a, b = (self.coordinates[device] for device in (source, target))
            used.update(self._way(a, b))
        return max(used.values(), default=0)

    def _way(self, a: Coordinates, b: Coordinates) -> list[tuple]:
        """The links from a to b, each a place, an axis and a direction."""
        if not self.chip.axes:
            slower = self.chip.link / self.chip.network if a[0] != b[0] else 1
            return [(a, 0, 1)] * round(slower) if a != b else []
        way, at = [], list(a)
        for axis, (length, ring) in enumerate(zip(self.lengths, self.rings, strict=True)):
            distance = b[axis] - at[axis]
            if ring and abs(distance) > length / 2:
                distance -= length if distance > 0 else -length
            direction = 1 if distance > 0 else -1
            for _ in range(abs(distance)):
                way.append((tuple(at), axis, direction))
                at[axis] = (at[axis] + direction) % length
        return way


def of_devices(chip: Chip, devices: Sequence) -> Links:
    """For devices in the order of the mesh."""
    if chip.axes:
        places = [tuple(device.coords)[: chip.axes] for device in devices]
        start = [min(column) for column in zip(*places, strict=True)]
        places = [tuple(x - y for x, y in zip(place, start, strict=True)) for place in places]
    else:
        places = [divmod(device.id, chip.ring) for device in devices]
    return Links(chip, tuple(places))
