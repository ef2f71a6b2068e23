"""
The paper's tables on a real teacher, from data to tables. In this order:

    python -m benchmarks.paper.data --text ... --eval ...     what travels: packed rows, questions, held-out text
    python -m benchmarks.paper.run --seconds 900              every student, trained and measured on this machine's GPUs
    python -m benchmarks.paper.report runs/paper              tables, curves, `eval.json` and card of the good student
"""
