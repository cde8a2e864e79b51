"""The order of things: request, session, plan, apply; what a program and a task call.

Promises: a plan is decided from the manifest and the state of the disk alone;
no file gets its final name before its bytes are verified; whatever stops a run,
the same request goes on with what was verified. Never: a dry run or a status
that reads the content of a file, or one wrong byte under a final name.

    from pathlib import Path
    from csm_weights.pipeline import apply
    from csm_weights.pipeline.request import Request

    request = Request(Path.cwd(), model="csm-1b", only=("safetensors",))
    outcome = apply.weights(request, smoke=False)
    print([action.verb for action in outcome.actions], outcome.error)
"""
