"""python -m pml_fewshot.reproduce RUN: evaluates a finished run again and compares every figure."""

from pml_fewshot.experiment.reproduction import main

if __name__ == "__main__":
    main()
