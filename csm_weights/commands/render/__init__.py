"""Results as text for a person, and as JSON for a machine.

Promises: each kind of result is rendered in one place for each of the two, and
a released key of JSON stays. Never: prints, or reads a file.

    from pathlib import Path
    from csm_weights.commands.render import json, text
    from csm_weights.pipeline import apply
    from csm_weights.pipeline.request import Request

    report = apply.status(Request(Path.cwd(), model="csm-1b"))
    print(text.render(report))
    print(json.render(report, "status"))
"""
