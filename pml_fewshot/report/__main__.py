"""python -m pml_fewshot.report RUN [RUN ...]: report.html of a run, or of several side by side."""

from pml_fewshot.experiment.runs_report import main

if __name__ == "__main__":
    main()
