"""Which method to use? Every method of zokern on a small model, and the main ones on a larger one, on two
labelled text sets, tuned alike, at equal cost.

    python -m benchmarks.study [--hours 4] [--forwards 300] [--large-forwards 100]

A run is one method on one model and set with one seed. zokern.tune and a few trials set its eps and lr, and
nothing else is chosen. A run that is done is a line of study.jsonl. It is not run again, unless a larger lr
is to be tried and proves better. Ctrl-C loses only the run under way. The order of runs (order.py) makes a
study useful that was ended early. Page and plot say what is missing. Two commands that share a file use two
cores, if their --sets or --models differ; --page then makes the page of both.
"""
