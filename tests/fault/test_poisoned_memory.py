"""Memory that moves, in a reservation that is poisoned: it is nobody's any more, and yet the pager may meet it."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from pathlib import Path

import pytest
from devices_in_tests import BrokenOnPurpose
from machine import PAGE, failing

import uvas

MOST_CALLS = 20

POISONED = """
import ctypes
import pytest
import uvas
from devices_in_tests import TableDevice

PAGE = 4096


class Stubborn(TableDevice):
    def protect(self, range, protection):
        error = uvas.DeviceError("protect", -5, "EIO", self.info.name)
        error.unrecoverable = True
        raise error


with (
    uvas.ProcessDevice(name="stays", memory="private", granule=PAGE) as stays,  # and with it the pager
    uvas.ProcessDevice(name="goes", memory="private", granule=PAGE) as goes,
    uvas.AddressSpace([stays]),
):
    space = uvas.AddressSpace([goes, Stubborn()])
    held = space.reserve(4 * PAGE)
    held.commit()
    goes.write(held.base, bytes([7]) * 8)  # on the device, so that the pager watches the host
    with pytest.raises(uvas.DeviceError, match="answered"):
        held.protect(0, PAGE, "r")
    assert space.stats().poisoned_bytes == 4 * PAGE
    space.detach(goes)
    assert ctypes.string_at(held.base, 8) == bytes([7]) * 8
    assert ctypes.string_at(held.base + 2 * PAGE, 8) == bytes(8)  # a fault that the pager resolves
    print("good")
    space.close()
"""


def test_who_touches_a_poisoned_reservation_after_its_last_device_is_served() -> None:
    """What is freed is filled with rubbish, so that the pager trips over what was freed too early."""
    environment = os.environ | {"MALLOC_PERTURB_": "165", "PYTHONPATH": str(Path(__file__).parents[1])}
    done = subprocess.run(
        [sys.executable, "-X", "faulthandler", "-W", "ignore::ResourceWarning", "-c", POISONED],
        capture_output=True,
        text=True,
        env=environment,
        timeout=60,
        check=False,
    )
    assert (done.returncode, done.stdout) == (0, "good\n"), done.stderr


class Clinging(uvas.ProcessDevice):
    """A worker that does not give memory back while it is told not to."""

    clings = refused = False

    def decommit(self, range: uvas.Range) -> None:
        if self.clings:
            self.refused = True
            raise BrokenOnPurpose("decommit")
        super().decommit(range)


@pytest.mark.filterwarnings("ignore:.*was never released")  # nobody can release what is poisoned
def test_a_worker_that_keeps_what_cannot_be_watched_poisons_the_reservation() -> None:
    """Its memory is there and nobody would hear of its faults: that is no state to go on in."""
    poisoned = 0
    with Clinging(name="clings", memory="private", granule=PAGE) as device, uvas.AddressSpace([device]) as space:
        for k in range(1, MOST_CALLS):
            held = space.reserve(PAGE)
            device.clings, device.refused = True, False
            caught: Exception | None = None
            try:
                with failing(k, lasting=False, error=errno.ENOMEM):
                    held.commit()
            except (uvas.UvasError, OSError, BrokenOnPurpose) as error:
                caught = error
            assert ("poisoned" in str(caught)) == device.refused
            device.clings = False
            if device.refused:
                assert isinstance(caught, uvas.DeviceError)
                assert (caught.unrecoverable, caught.name, caught.device) == (True, "ENOMEM", "clings")
            poisoned += PAGE * device.refused
            assert space.stats().poisoned_bytes == poisoned
            if device.refused:
                with pytest.raises(uvas.ReleasedError):
                    held.commit()
                with pytest.raises(uvas.ReleasedError):
                    held.release()
            else:
                held.release()
    assert poisoned
