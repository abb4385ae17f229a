"""python -m pml_fewshot.app: teach classes on a page of your own machine."""

from pml_fewshot.app.command import main

if __name__ == "__main__":
    main()
