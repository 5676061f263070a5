"""The peak of a forecast is that of its largest phase."""

from __future__ import annotations

from sd3_lora.common.memory import GIB
from sd3_lora.gpu.forecast import Forecast, Phase


def test_the_largest_phase_has_the_peak() -> None:
    step = Phase("step", {"weights": 4 * GIB, "nothing": 0, "activations": GIB // 2})
    save = Phase("save", {"weights": 4 * GIB})
    for phases in ((step, save), (save, step)):
        forecast = Forecast(phases)
        assert forecast.largest is step
        assert forecast.peak_bytes == step.peak_bytes == 4 * GIB + GIB // 2
    assert step.sentence() == "weights 4.00 + activations 0.50 = 4.50 GiB"


def test_nothing_may_be_forecast() -> None:
    assert Forecast().peak_bytes == 0
    assert Forecast().largest.parts == {}
