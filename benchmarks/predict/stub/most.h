// The most blocks and tasks of one launch, included before every source: a test may lower them, so that small images
// are cut into several launches.
#pragma once

#include <cstdint>

extern std::int64_t wavemix_most_tasks, wavemix_most_blocks;
#define WAVEMIX_MAX_TASKS ::wavemix_most_tasks
#define WAVEMIX_MAX_BLOCKS ::wavemix_most_blocks
