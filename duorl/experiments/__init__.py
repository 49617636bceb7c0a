"""Experiments: what a run does, from typed options to files of results. The command line starts them.

    table                                        one line for each experiment
    learners, options, paper_options -> built    options from plain values
    voice                                        what an experiment says while it runs
    reading                                      what options name to read
    material, comparing, workbench, trainings    what several experiments use
    train, compare, evaluate, oracle, label, paper, dense, convert, pretrain     one module for each experiment

The module of an experiment has `prepare(options, config)`, which checks the input. It returns the default name of the
run's folder, and the function that works in it.
"""
