"The counting of faults: a fault is survived only when its block ends without an error."
import json
from types import SimpleNamespace

import pytest
from faults import Faults, counted


def test_what_raises_is_lost():
    faults = Faults(whole=False)
    with faults("data", "blank text"):
        pass
    with pytest.raises(ValueError), faults("data", "blank text"):
        raise ValueError
    faults.measured("data", "memory", 1.5, "MB")
    report = SimpleNamespace(user_properties=[("faults", json.dumps(faults.rows))])
    assert counted([report, report]) == [
        dict(group="data", fault="blank text", injected=4, survived=2), *[dict(group="data", fault="memory", value=1.5, unit="MB")] * 2]


def test_torture_is_larger():
    assert [Faults(whole).size(3, 40) for whole in (False, True)] == [3, 40]
