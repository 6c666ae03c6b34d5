"""What the console leaves out of TensorFlow's output."""

from __future__ import annotations

from dtrain.launch.chatter import Chatter

SAID = """\
WARNING: All log messages before absl::InitializeLog() is called are written to STDERR
I0000 00:00:1795246406.497733   20521 eager_service_impl.cc:350] Creating sync eager service context on host vm
I0000 00:00:1795246406.497817   20521 eager_service_impl.cc:356] SessionOptions: device_count {
  key: "CPU"
  value: 1
}
allow_soft_placement: true

loss: 0.5
W0000 00:00:1795246406.497817   20521 gpu_device.cc:22] Cannot dlopen some GPU libraries
epoch 1
I0000 00:00:1795246406.497817   20521 a.cc:22] something
loss: 0.4
E0000 00:00:1795246406.497817   20521 coordination_service.cc:7] worker 1 has gone
  key: "why"
"""


def test_messages_of_native_code_below_errors_are_left_out() -> None:
    lines = SAID.splitlines()
    kept = ["loss: 0.5", "epoch 1", "loss: 0.4", *lines[-2:]]
    assert Chatter().drop(0, lines) == kept
    chatter = Chatter()
    assert [line for line in lines for line in chatter.drop(3, [line])] == kept  # also when they come one by one


def test_each_rank_has_its_own() -> None:
    chatter = Chatter()
    lines = SAID.splitlines()
    assert chatter.drop(0, lines[:3]) == []
    assert chatter.drop(1, lines[3:6]) == lines[3:6]
    assert chatter.drop(0, lines[3:6]) == []


def test_a_script_s_own_lines_are_never_swallowed_for_long() -> None:
    begun = "I0000 00:00:1795246406.497817   20521 a.cc:356] config {"
    own = [f"step: {number}" for number in range(100)]
    assert Chatter().drop(0, [begun, '  key: "CPU"', "}", *own]) == own
    assert Chatter().drop(0, [begun, "epoch 1", *own]) == ["epoch 1", *own]
    assert len(Chatter().drop(0, [begun, *own])) >= 50  # a brace that is never closed
