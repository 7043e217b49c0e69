"""Tasks of policies that learn of what they generate.

PolicyTask                    rollouts, ratios, metrics (policy.py)
├── ReferencePolicyTask       held near a frozen model
│   ├── GrpoTask              grpo.py: advantages within groups, all losses of TRL
│   ├── RlooTask              rloo.py: leave-one-out, ratios of whole sequences
│   └── PpoTask               ppo.py: a value of every token
└── OnPolicyDistillationTask  on_policy_distillation.py: a teacher in place of
                              rewards
"""
