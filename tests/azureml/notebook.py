"""Runs cells in a real Jupyter kernel as a notebook's page does, and says as JSON what was shown. Started by test_notebook.py.

    python notebook.py CELLS.json

Unlike nbclient it also takes what a thread sends while no cell is executed. A cell whose first line is ``# until: TEXT`` is over
when TEXT is shown anywhere in the notebook; one that begins with ``# interrupt when: FILE`` is interrupted when that file exists.
After CELL_S seconds in one cell it ends with what was shown until then.
"""

import json
import os
import queue
import sys
import time

from jupyter_client.manager import start_new_kernel

CELL_S = 90


class Page:
    """Every cell's outputs, and the widgets' states."""

    def __init__(self, manager, client):
        self.manager, self.client = manager, client
        self.outputs, self.widgets, self.cells = [], {}, {}

    def execute(self, text):
        """Send one cell, and take what comes until it has ended, and what else is waited for has come."""
        word, _, condition = text.partition("\n")[0].partition(": ")
        cell = self.client.execute(text)
        self.cells[cell] = len(self.outputs)
        self.outputs.append([])
        ended, until = False, time.monotonic() + CELL_S
        while not ended or (word == "# until" and condition not in json.dumps(self.shown())):
            if time.monotonic() > until:
                sys.exit(f"this cell did not end{' as told' if ended else ''}:\n{text}\n{json.dumps(self.shown(), indent=1)}")
            if word == "# interrupt when" and os.path.exists(condition):
                self.manager.interrupt_kernel()
                word = ""
            try:
                message = self.client.get_iopub_msg(timeout=0.1)
            except queue.Empty:
                continue
            self.take(message)
            is_idle = message["msg_type"] == "status" and message["content"]["execution_state"] == "idle"
            ended = ended or (is_idle and message["parent_header"].get("msg_id") == cell)

    def take(self, message):
        """Keep what one message of the kernel shows."""
        kind, content = message["msg_type"], message["content"]
        if kind in ("comm_open", "comm_msg"):
            self.widgets.setdefault(content["comm_id"], {}).update(content["data"].get("state", {}))
        elif kind == "update_display_data":
            for output in (output for outputs in self.outputs for output in outputs):
                if output.get("transient") == content["transient"]:
                    output["data"] = content["data"]
        elif kind in ("stream", "display_data", "execute_result", "error"):
            self.outputs[self.cells[message["parent_header"]["msg_id"]]].append(content)

    def shown(self):
        return {"outputs": self.outputs, "widgets": list(self.widgets.values())}


def main():
    with open(sys.argv[1]) as file:
        cells = json.load(file)
    manager, client = start_new_kernel(kernel_name="python3")
    page, after = Page(manager, client), []
    try:
        for text in cells:
            page.execute(text)
            after.append(json.loads(json.dumps(page.shown())))
    finally:
        client.stop_channels()
        manager.shutdown_kernel()
    print(json.dumps(after))


main()
