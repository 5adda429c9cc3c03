package daemon

const roleEnv = "TATAMI_TEST_ROLE"

func play(string) int { return 2 }
