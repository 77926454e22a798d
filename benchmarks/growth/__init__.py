"""Does growing help? One command an experiment; `report` writes docs/results.md from what they stored.

    pip install "morphc[experiments]"
    python -m benchmarks.growth.teacher_student
    python -m benchmarks.growth.report

The others are slow_regression, random_labels, permuted_pixels and mnist1d_growth.
"""
