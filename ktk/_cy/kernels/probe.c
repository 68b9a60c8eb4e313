/* CPU probe. Compiled with baseline flags and without LTO: it runs before anything is known.
 *
 * A feature counts only if the operating system saves its registers (XCR0): cpuid alone reports
 * AVX-512 under kernels and hypervisors that do not, and the first zmm instruction then faults.
 * Source: Intel SDM vol. 1, 13.2 and 14.5; vol. 2, CPUID; vol. 1, 18.3 for tiles; Linux
 * Documentation/arch/x86/xstate.rst. */
#define _GNU_SOURCE /* syscall */
#include "ktk_probe.h"

#include <errno.h>
#include <stddef.h>

#define KTK_FEATURE_NAME(suffix, name) name,
static const char *const feature_names[] = {KTK_FEATURES(KTK_FEATURE_NAME)};

int ktk_probe_num_features(void) { return KTK_NUM_FEATURES; }

const char *ktk_probe_feature_name(int index) {
    return index >= 0 && index < KTK_NUM_FEATURES ? feature_names[index] : NULL;
}

#if defined(__x86_64__)

#include <cpuid.h>
#if defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

enum { ARCH_REQ_XCOMP_PERM = 0x1023, XFEATURE_XTILEDATA = 18 };

/* XCR0 bits. */
#define STATE_AVX UINT64_C(0x6)       /* XMM, upper YMM */
#define STATE_AVX512 UINT64_C(0xe0)   /* opmask, upper ZMM0-15, ZMM16-31 */
#define STATE_TILES UINT64_C(0x60000) /* XTILECFG, XTILEDATA */

typedef struct {
    unsigned eax, ebx, ecx, edx;
} cpuid_regs;

/* All zero above the highest leaf, where cpuid itself would answer with another leaf's data. */
static cpuid_regs cpuid(unsigned leaf, unsigned subleaf) {
    cpuid_regs r = {0, 0, 0, 0};
    if (leaf <= __get_cpuid_max(0, NULL)) __cpuid_count(leaf, subleaf, r.eax, r.ebx, r.ecx, r.edx);
    return r;
}

static uint64_t read_xcr0(void) {
    uint32_t low, high;
    __asm__ volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
    return (uint64_t)high << 32 | low;
}

/* Palette 1 as the kernels assume it: 8 tiles of 16 rows of 64 bytes. */
static int has_palette1(void) {
    if (cpuid(0x1d, 0).eax < 1) return 0;
    cpuid_regs p = cpuid(0x1d, 1);
    return p.eax >> 16 == 1024 && p.ebx >> 16 == 8 && (p.ebx & 0xffff) == 64 &&
           (p.ecx & 0xffff) == 16;
}

int ktk_probe_request_tiles(void) {
#if defined(__linux__)
    return syscall(SYS_arch_prctl, ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA) == 0 ? 0 : -errno;
#else
    return -ENOSYS; /* no other system we know hands out tiles */
#endif
}

uint64_t ktk_probe_features(int asks_for_tiles, int *refused) {
    *refused = 0;
    cpuid_regs leaf1 = cpuid(1, 0);
    if (!(leaf1.ecx >> 27 & 1)) return 0; /* OSXSAVE: without it xgetbv faults */
    uint64_t xcr0 = read_xcr0();
    cpuid_regs leaf7 = cpuid(7, 0);
    cpuid_regs leaf7_1 = {0, 0, 0, 0};
    if (leaf7.eax >= 1) leaf7_1 = cpuid(7, 1);

    const int avx = (leaf1.ecx >> 28 & 1) && (xcr0 & STATE_AVX) == STATE_AVX;
    const int avx512 = avx && (leaf7.ebx >> 16 & 1) && (xcr0 & STATE_AVX512) == STATE_AVX512;
    const int has_tiles = asks_for_tiles && avx && (leaf7.edx >> 24 & 1) &&
                          (xcr0 & STATE_TILES) == STATE_TILES && has_palette1();
    if (has_tiles) *refused = -ktk_probe_request_tiles();
    const int tiles = has_tiles && *refused == 0;

    uint64_t found = 0;
#define ADD(suffix, usable, reg, bit)                                                              \
    if ((usable) && ((reg) >> (bit) & 1)) found |= UINT64_C(1) << KTK_FEATURE_##suffix
    ADD(AVX2, avx, leaf7.ebx, 5);
    ADD(FMA, avx, leaf1.ecx, 12);
    ADD(F16C, avx, leaf1.ecx, 29);
    ADD(AVX512F, avx512, leaf7.ebx, 16);
    ADD(AVX512BW, avx512, leaf7.ebx, 30);
    ADD(AVX512VL, avx512, leaf7.ebx, 31);
    ADD(AVX512DQ, avx512, leaf7.ebx, 17);
    ADD(AVX512VNNI, avx512, leaf7.ecx, 11);
    ADD(AVX512_BF16, avx512, leaf7_1.eax, 5);
    ADD(AVX512VBMI, avx512, leaf7.ecx, 1);
    ADD(AVX_VNNI, avx, leaf7_1.eax, 4);
    ADD(AMX_TILE, tiles, leaf7.edx, 24);
    ADD(AMX_INT8, tiles, leaf7.edx, 25);
    ADD(AMX_BF16, tiles, leaf7.edx, 22);
#undef ADD
    return found;
}

#else

int ktk_probe_request_tiles(void) { return -ENOSYS; }

uint64_t ktk_probe_features(int asks_for_tiles, int *refused) {
    (void)asks_for_tiles;
    *refused = 0;
    return 0;
}

#endif
