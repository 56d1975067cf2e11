"""From an engine to a profile, and how well a simulation by the profile does.

    timing             time work of engines, each piece alone
    step_times         the table of a sweep: measured, of a profile, checked
    program_times      a deployment as such a table, without its engine
    measure            calibrate: programs and held-out loads -> a profile
    fit                coefficients for programs that were not measured
    profile_keys       the keys of an engine's work in a profile
    machine_speed      the speed of a shared machine in a run
    decision_agreement how far two runs decided alike

It is the one room that knows both the engine and the simulator.
"""
