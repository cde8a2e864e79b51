"""What people call and see: a module for each task, and the rendering of its result.

Promises: a task returns a value or raises an error of this package, and is the
same for `inv`, `make` and a program; options, help, exit codes and printing are
written once, in `task` and `cli`. Never: a module of a task prints, or parses an option;
listing the tasks imports nothing heavy.

    from pathlib import Path
    from csm_weights.commands.render import text
    from csm_weights.commands.verify import verify
    from csm_weights.pipeline.request import Request

    print(text.render(verify(Request(Path.cwd(), model="csm-1b"))))
"""
