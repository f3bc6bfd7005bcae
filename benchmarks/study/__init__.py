"""Which method to use? Every method of zokern on two models
and two labelled text sets, tuned alike, at equal cost.

    python -m benchmarks.study [--hours 4] [--forwards 1000] [--large-forwards 300]

A run is one method on one model and set with one seed. zokern.tune sets its eps and lr, and nothing else is
chosen. A run that is done is a line of study.jsonl: it is not run again, and Ctrl-C loses only the run under
way. The order of runs (order.py) makes a study useful that was ended early. Page and plot say what is
missing.
"""
