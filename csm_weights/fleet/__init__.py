"""Many machines: one download, every node verified, on a cluster of Ray.

Promises: each block leaves the first holder, or the Hub, once; a block counts at a node only if
it has the digest that a verified piece has there, a piece only if it has the manifest's, and a
file gets its name by the same code as on one machine. A node that dies, lies or lags costs the
others little, and stands in the report. Never: stops a process that it did not start, sends a
token to a node that does not fetch, or takes a block for right because a node says so.

    from csm_weights.fleet.planner import Planner

    planner = Planner(blocks=2, nodes=3, has_origin=False)
    planner.holds(0, 0b11)
    planner.offers(0, 0b11)
    print(planner.ask(1, first=True, now=0.0), planner.ask(2, first=True, now=0.0))
"""
