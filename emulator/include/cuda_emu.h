/* What the emulator exports beside the CUDA driver API.
 *
 * A program that may run on either driver asks the loader for `emu_version`, which only the emulator exports. Functions
 * that return an int return a CUresult. Texts take two steps: with `*bytes` as the room in `text` (which may be NULL),
 * the call writes as much as fits, terminated, and sets `*bytes` to the length of the whole text including the
 * terminator.
 */
#ifndef CUDA_EMU_H
#define CUDA_EMU_H

#include <stddef.h>

#ifdef __cplusplus
extern "C" {
#endif

/* The emulator's version, as "0.1.0". Works before cuInit. */
const char *emu_version(void);

/* Why this host thread's last failed driver call failed, in one sentence: for a kernel's fault it names kernel, block,
 * thread, instruction, PTX line, address and nearest allocation. Never NULL; valid until the thread's next failure. */
const char *emu_last_message(void);

/* Changes how launches of this host thread are run. `name` and `value` are as in the variable CUDA_EMU_NAME, but for
 * the last, which has none:
 *   "checks"   all, fast, none, or a list: bounds, uninitialised, shared_races, barrier_divergence, inactive_shuffle,
 *              global_races, stream_order, leaks
 *   "seed"     none, or a number: blocks, warps and graph nodes run in a random order drawn from it
 *   "threads"  host threads that run blocks; 0 is one per core
 *   "isa"      auto, portable, avx2, avx512
 *   "kinds"    numbers, as "126,1024": the next launches have so many blocks of one kind, then so many of the next. If
 *              CUDA_EMU_BLOCKS lets some blocks run, some of each kind do, and counts are weighted by their numbers.
 *              Launches of other grids are not concerned. "" for none
 * A launch without "uninitialised" does not record what it writes, which ends that check on its device for good: use it
 * in every launch of a process or in none. A NULL value undoes all changes of this thread. */
int emu_configure(const char *name, const char *value);

/* Counters of every launch so far, summed per kernel, with the faults and leaks reported so far, as JSON. */
int emu_profile_json(char *text, size_t *bytes);

/* Kernel and counters of this host thread's last launch as JSON; "null" before the first. */
int emu_last_launch_json(char *text, size_t *bytes);

/* Starts counting anew. */
int emu_profile_reset(void);

/* Writes the file that CUDA_EMU_PROFILE names now, and not only when a context is destroyed or the process ends. */
int emu_profile_write(void);

#ifdef __cplusplus
}
#endif

#endif
