/* The SIGILL handler: decode, check, compute, step over the instruction.
 *
 * Only what a signal handler may do: no locks, no malloc, no stdio. A thread's tiles come from mmap
 * at its first tile instruction and stay when it ends (9 KiB; pools keep their threads). Memory is
 * read and written through process_vm_readv and writev, which report a bad address instead of
 * raising SIGSEGV in here. A signal handler that itself uses tiles shares them with the code it
 * interrupted, unlike on silicon.
 *
 * Source: Intel SDM vol. 2, chapters 2.3 (VEX) and 3 to 4 (the instructions); vol. 1, chapter 18.
 */
#define _GNU_SOURCE
#include "tile_emulator.h"

#include <cpuid.h>
#include <errno.h>
#include <immintrin.h>
#include <math.h>
#include <signal.h>
#include <stdatomic.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <ucontext.h>
#include <unistd.h>

enum { NUM_TILES = 8, MAX_ROWS = 16, MAX_COLSB = 64 };

typedef struct {
    int configured;
    uint8_t rows[NUM_TILES];
    uint8_t colsb[NUM_TILES];
    /* Zero beyond a tile's rows and colsb. */
    _Alignas(64) uint8_t data[NUM_TILES][MAX_ROWS][MAX_COLSB];
} tiles;

/* initial-exec: other models may call malloc at a thread's first access. */
#define THREAD_LOCAL static _Thread_local __attribute__((tls_model("initial-exec")))
THREAD_LOCAL tiles *thread_tiles;
THREAD_LOCAL int thread_fault;

static atomic_uint_fast64_t counts[KTK_TILE_NUM_KINDS];
static atomic_int recording;
static struct sigaction previous;

#define KIND_NAME(id, name) name,
static const char *const kind_names[] = {KTK_TILE_KINDS(KIND_NAME)};
#define FAULT_NAME(id, name, text) name,
static const char *const fault_names[] = {"", KTK_TILE_FAULTS(FAULT_NAME)};
#define FAULT_TEXT(id, name, text) text,
static const char *const fault_texts[] = {"", KTK_TILE_FAULTS(FAULT_TEXT)};
#define FAULT(id) KTK_TILE_FAULT_##id

/* One decoded instruction. */
typedef struct {
    int kind, length;
    int fault;                  /* of the encoding */
    int dest, source1, source2; /* tile numbers: ModRM.reg, ModRM.rm, VEX.vvvv */
    uint64_t address;           /* of row 0, or of the configuration */
    int64_t stride;
} instruction;

static int is_dot(int kind) { return kind >= KTK_TILE_TDPBSSD; }
static int is_configuration(int kind) {
    return kind == KTK_TILE_LDTILECFG || kind == KTK_TILE_STTILECFG;
}

/* Opcode, VEX.pp and whether ModRM names memory tell the kind; -1 = not ours. */
static int kind_of(int opcode, int pp, int modrm) {
    static const int load_store[] = {-1, KTK_TILE_TILELOADDT1, KTK_TILE_TILESTORED,
                                     KTK_TILE_TILELOADD};
    static const int dot[] = {KTK_TILE_TDPBUUD, KTK_TILE_TDPBUSD, KTK_TILE_TDPBSUD,
                              KTK_TILE_TDPBSSD};
    int is_memory = modrm >> 6 != 3;
    switch (opcode) {
    case 0x49:
        if (is_memory) return pp == 0 ? KTK_TILE_LDTILECFG : pp == 1 ? KTK_TILE_STTILECFG : -1;
        if (pp == 0) return modrm == 0xc0 ? KTK_TILE_TILERELEASE : -1;
        return pp == 3 && (modrm & 7) == 0 ? KTK_TILE_TILEZERO : -1;
    case 0x4b:
        return is_memory ? load_store[pp] : -1;
    case 0x5c:
        return !is_memory && pp == 2 ? KTK_TILE_TDPBF16PS : -1;
    case 0x5e:
        return is_memory ? -1 : dot[pp];
    default:
        return -1;
    }
}

static uint64_t general_register(const greg_t *regs, int number) {
    static const int place[] = {REG_RAX, REG_RCX, REG_RDX, REG_RBX, REG_RSP, REG_RBP,
                                REG_RSI, REG_RDI, REG_R8,  REG_R9,  REG_R10, REG_R11,
                                REG_R12, REG_R13, REG_R14, REG_R15};
    return (uint64_t)regs[place[number]];
}

static int64_t signed32(const uint8_t *p) {
    int32_t v;
    memcpy(&v, p, 4);
    return v;
}

/* The memory operand behind ModRM at p; sets address and stride, returns its bytes, ModRM counted.
 */
static int decode_address(const uint8_t *p, int vex_x, int vex_b, const greg_t *regs,
                          instruction *in) {
    int mod = p[0] >> 6, rm = p[0] & 7, n = 1;
    if (rm == 4) {
        int sib = p[n++], index = (sib >> 3 & 7) | vex_x << 3, base = sib & 7;
        in->stride = index == 4 ? 0 : (int64_t)(general_register(regs, index) << (sib >> 6));
        if (base == 5 && mod == 0) {
            in->address = (uint64_t)signed32(p + n);
            return n + 4;
        }
        in->address = general_register(regs, base | vex_b << 3);
    } else {
        if (!is_configuration(in->kind)) in->fault = FAULT(NO_SIB);
        if (rm == 5 &&
            mod == 0) { /* relative to the next instruction, which begins behind the displacement */
            in->address = (uint64_t)(p + n + 4) + (uint64_t)signed32(p + n);
            return n + 4;
        }
        in->address = general_register(regs, rm | vex_b << 3);
    }
    if (mod == 1) in->address += (uint64_t)(int64_t)(int8_t)p[n];
    if (mod == 2) in->address += (uint64_t)signed32(p + n);
    return n + (mod == 1 ? 1 : mod == 2 ? 4 : 0);
}

/* 0 if the bytes at `code` are no tile instruction. */
static int decode(const uint8_t *code, const greg_t *regs, instruction *in) {
    const uint8_t *p = code;
    *in = (instruction){0};
    while (*p == 0x64 || *p == 0x65 || *p == 0x67 || *p == 0x2e || *p == 0x36 || *p == 0x3e ||
           *p == 0x26) {
        if (p - code == 8) return 0;
        p++;
    }
    if (p[0] != 0xc4 || (p[1] & 31) != 2) return 0; /* three-byte VEX, map 0F38 */
    if (p[3] != 0x49 && p[3] != 0x4b && p[3] != 0x5c && p[3] != 0x5e) return 0;
    int vex_r = !(p[1] & 0x80), vex_x = !(p[1] & 0x40), vex_b = !(p[1] & 0x20);
    int vvvv = ~(p[2] >> 3) & 15, modrm = p[4];
    in->kind = kind_of(p[3], p[2] & 3, modrm);
    if (in->kind < 0) return 0;
    in->dest = (modrm >> 3 & 7) | vex_r << 3;
    in->source1 = (modrm & 7) | vex_b << 3;
    in->source2 = vvvv;
    int operands = 1;
    if (modrm >> 6 != 3) operands = decode_address(p + 4, vex_x, vex_b, regs, in);
    in->length = (int)(p - code) + 4 + operands;

    int has_tile = !is_configuration(in->kind) && in->kind != KTK_TILE_TILERELEASE;
    if (p != code) in->fault = FAULT(PREFIX);
    if (p[2] & 0x84) in->fault = FAULT(ENCODING); /* W, L */
    /* must be 1111, stored inverted */
    if (!is_dot(in->kind) && vvvv) in->fault = FAULT(ENCODING);
    /* ModRM.reg is part of the opcode */
    if (!has_tile && (in->dest || vex_r)) in->fault = FAULT(ENCODING);
    if (has_tile && in->dest >= NUM_TILES) in->fault = FAULT(TILE_NUMBER);
    if (is_dot(in->kind) && (in->source1 >= NUM_TILES || in->source2 >= NUM_TILES))
        in->fault = FAULT(TILE_NUMBER);
    return 1;
}

/* num_rows rows of `bytes` at address + r * stride, to or from one 64-byte row of `rows` each. */
static int copy_rows(uint8_t (*rows)[MAX_COLSB], int num_rows, int bytes, uint64_t address,
                     int64_t stride, int is_write) {
    if (bytes == MAX_COLSB && stride == MAX_COLSB) { /* one piece: half the cost of sixteen */
        bytes *= num_rows;
        num_rows = 1;
    }
    struct iovec local[MAX_ROWS], remote[MAX_ROWS];
    for (int r = 0; r < num_rows; r++) {
        local[r] = (struct iovec){rows[r], (size_t)bytes};
        remote[r] =
            (struct iovec){(void *)(address + (uint64_t)stride * (uint64_t)r), (size_t)bytes};
    }
    unsigned long n = (unsigned long)num_rows;
    ssize_t done =
        (is_write ? process_vm_writev : process_vm_readv)(getpid(), local, n, remote, n, 0);
    if (done == (ssize_t)num_rows * bytes) return 0;
    /* a sandbox: a bad address is SIGSEGV then */
    if (done < 0 && (errno == EPERM || errno == ENOSYS)) {
        for (int r = 0; r < num_rows; r++)
            memcpy(is_write ? remote[r].iov_base : local[r].iov_base,
                   is_write ? local[r].iov_base : remote[r].iov_base, (size_t)bytes);
        return 0;
    }
    return is_write ? FAULT(UNWRITABLE) : FAULT(UNREADABLE);
}

static int any_byte(const uint8_t *p, int begin, int end) {
    for (int i = begin; i < end; i++)
        if (p[i]) return 1;
    return 0;
}

static void release(tiles *t) { memset(t, 0, sizeof *t); }

/* The 64 bytes of a configuration: palette, start_row, 14 reserved, 16 x 2 colsb, 16 rows. */
static int load_configuration(tiles *t, uint64_t address) {
    uint8_t c[1][MAX_COLSB];
    int fault = copy_rows(c, 1, 64, address, 0, 0);
    if (fault) return fault;
    const uint8_t *b = c[0];
    if (b[0] > 1) return FAULT(PALETTE);
    if (b[1]) return FAULT(START_ROW);
    if (any_byte(b, 2, 16) || any_byte(b, 32, 48) || any_byte(b, 56, 64)) return FAULT(RESERVED);
    if (b[0] == 0 && any_byte(b, 16, 64)) return FAULT(RESERVED);
    for (int n = 0; n < NUM_TILES; n++) {
        int colsb = b[16 + 2 * n] | b[17 + 2 * n] << 8, rows = b[48 + n];
        if (rows > MAX_ROWS) return FAULT(ROWS);
        if (colsb > MAX_COLSB) return FAULT(COLSB);
        if (!rows != !colsb) return FAULT(HALF_A_TILE);
    }
    release(t);
    t->configured = b[0];
    for (int n = 0; n < NUM_TILES; n++) {
        t->rows[n] = b[48 + n];
        t->colsb[n] = b[16 + 2 * n];
    }
    return 0;
}

static int store_configuration(const tiles *t, uint64_t address) {
    uint8_t c[1][MAX_COLSB] = {{0}};
    c[0][0] = (uint8_t)t->configured;
    for (int n = 0; n < NUM_TILES; n++) {
        c[0][16 + 2 * n] = t->colsb[n];
        c[0][48 + n] = t->rows[n];
    }
    return copy_rows(c, 1, 64, address, 0, 1);
}

static int load_tile(tiles *t, int n, uint64_t address, int64_t stride) {
    uint8_t rows[MAX_ROWS][MAX_COLSB] = {{0}};
    int fault = copy_rows(rows, t->rows[n], t->colsb[n], address, stride, 0);
    if (!fault) memcpy(t->data[n], rows, sizeof rows);
    return fault;
}

static int store_tile(tiles *t, int n, uint64_t address, int64_t stride) {
    if (t->rows[n] > 1 && stride < t->colsb[n] && -stride < t->colsb[n]) return FAULT(ROWS_OVERLAP);
    return copy_rows(t->data[n], t->rows[n], t->colsb[n], address, stride, 1);
}

static int dot_fault(const tiles *t, int c, int a, int b) {
    if (c == a || c == b || a == b) return FAULT(SAME_TILE);
    if (!t->rows[c] || !t->rows[a] || !t->rows[b]) return FAULT(NO_SHAPE);
    if (t->colsb[c] % 4 || t->colsb[a] % 4 || t->colsb[b] % 4) return FAULT(DWORDS);
    if (t->rows[c] != t->rows[a]) return FAULT(DOT_ROWS);
    if (t->colsb[a] / 4 != t->rows[b]) return FAULT(DOT_K);
    if (t->colsb[c] != t->colsb[b]) return FAULT(DOT_COLUMNS);
    return 0;
}

/* Beyond their shapes tiles are zero, so whole tiles are computed. Sums wrap, hence unsigned. */
__attribute__((target("avx2"))) static void dot_bytes(uint8_t (*c)[MAX_COLSB],
                                                      uint8_t (*a)[MAX_COLSB],
                                                      uint8_t (*b)[MAX_COLSB], int a_signed,
                                                      int b_signed) {
    int32_t wide[MAX_ROWS][4][16];
    for (int k = 0; k < MAX_ROWS; k++)
        for (int n = 0; n < 16; n++)
            for (int j = 0; j < 4; j++)
                wide[k][j][n] = b_signed ? (int8_t)b[k][4 * n + j] : b[k][4 * n + j];
    for (int m = 0; m < MAX_ROWS; m++) {
        uint32_t sum[16];
        memcpy(sum, c[m], sizeof sum);
        for (int k = 0; k < MAX_ROWS; k++)
            for (int j = 0; j < 4; j++) {
                int32_t x = a_signed ? (int8_t)a[m][4 * k + j] : a[m][4 * k + j];
                for (int n = 0; n < 16; n++) sum[n] += (uint32_t)(x * wide[k][j][n]);
            }
        memcpy(c[m], sum, sizeof sum);
    }
}

static float bf16(const uint8_t *p) {
    uint32_t bits = (uint32_t)p[0] << 16 | (uint32_t)p[1] << 24;
    float x;
    memcpy(&x, &bits, 4);
    return x;
}

/* Even and odd k are summed apart, by fma in order of k, then together, then onto the result. Not
 * inlined: the caller sets the float mode around it. */
__attribute__((target("fma"), noinline)) static void dot_bf16(uint8_t (*c)[MAX_COLSB],
                                                              uint8_t (*a)[MAX_COLSB],
                                                              uint8_t (*b)[MAX_COLSB], int rows,
                                                              int num_k, int columns) {
    for (int m = 0; m < rows; m++)
        for (int n = 0; n < columns; n++) {
            float even = 0, odd = 0, sum;
            for (int k = 0; k < num_k; k++) {
                even = fmaf(bf16(a[m] + 4 * k), bf16(b[k] + 4 * n), even);
                odd = fmaf(bf16(a[m] + 4 * k + 2), bf16(b[k] + 4 * n + 2), odd);
            }
            memcpy(&sum, c[m] + 4 * n, 4);
            sum += even + odd;
            memcpy(c[m] + 4 * n, &sum, 4);
        }
}

static int dot(tiles *t, const instruction *in) {
    int c = in->dest, a = in->source1, b = in->source2;
    int fault = dot_fault(t, c, a, b);
    if (fault) return fault;
    if (in->kind == KTK_TILE_TDPBF16PS) {
        unsigned mode = _mm_getcsr();
        _mm_setcsr(0x9fc0); /* round to even, denormals are zero going in and out, no exceptions */
        dot_bf16(t->data[c], t->data[a], t->data[b], t->rows[c], t->colsb[a] / 4, t->colsb[c] / 4);
        _mm_setcsr(mode);
    } else {
        int a_signed = in->kind == KTK_TILE_TDPBSSD || in->kind == KTK_TILE_TDPBSUD;
        int b_signed = in->kind == KTK_TILE_TDPBSSD || in->kind == KTK_TILE_TDPBUSD;
        dot_bytes(t->data[c], t->data[a], t->data[b], a_signed, b_signed);
    }
    return 0;
}

/* Returns a fault, which leaves everything as it was. */
static int carry_out(const instruction *in) {
    if (in->fault) return in->fault;
    tiles *t = thread_tiles;
    if (!t) {
        t = mmap(NULL, sizeof *t, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
        if (t == MAP_FAILED) return FAULT(NO_MEMORY);
        thread_tiles = t;
    }
    switch (in->kind) {
    case KTK_TILE_LDTILECFG:
        return load_configuration(t, in->address);
    case KTK_TILE_STTILECFG:
        return store_configuration(t, in->address);
    case KTK_TILE_TILERELEASE:
        release(t);
        return 0;
    }
    if (!t->configured) return FAULT(UNCONFIGURED);
    if (is_dot(in->kind)) return dot(t, in);
    if (!t->rows[in->dest]) return FAULT(NO_SHAPE);
    if (in->kind == KTK_TILE_TILEZERO) {
        memset(t->data[in->dest], 0, sizeof t->data[0]);
        return 0;
    }
    if (t->colsb[in->dest] % 4) return FAULT(DWORDS);
    if (in->kind == KTK_TILE_TILESTORED) return store_tile(t, in->dest, in->address, in->stride);
    return load_tile(t, in->dest, in->address, in->stride);
}

static void put_text(const char *text) {
    if (write(2, text, strlen(text)) < 0) return; /* nowhere left to say it */
}

static void report(int fault, int kind) {
    put_text("ktk tile emulator: ");
    put_text(kind_names[kind]);
    put_text(": ");
    put_text(fault_names[fault]);
    put_text(": ");
    put_text(fault_texts[fault]);
    put_text("\n");
}

/* To whoever handled SIGILL before; by default that ends the process, at the instruction itself. */
static void pass_on(int signal_number, siginfo_t *info, void *context) {
    int was_sent = info->si_code <= 0;
    if (previous.sa_flags & SA_SIGINFO) {
        previous.sa_sigaction(signal_number, info, context);
    } else if (previous.sa_handler == SIG_IGN && was_sent) {
        return;
    } else if (previous.sa_handler == SIG_DFL || previous.sa_handler == SIG_IGN) {
        struct sigaction action = {.sa_handler = SIG_DFL};
        sigaction(SIGILL, &action, NULL);
        if (was_sent) raise(SIGILL); /* an instruction raises it again by itself */
    } else {
        previous.sa_handler(signal_number);
    }
}

static void on_sigill(int signal_number, siginfo_t *info, void *context) {
    int callers_errno = errno;
    ucontext_t *user = context;
    greg_t *regs = user->uc_mcontext.gregs;
    instruction in;
    /* sent, or not ours */
    if (info->si_code <= 0 || !decode((const uint8_t *)regs[REG_RIP], regs, &in)) {
        pass_on(signal_number, info, context);
        errno = callers_errno;
        return;
    }
    int fault = carry_out(&in);
    if (fault && !atomic_load(&recording)) {
        report(fault, in.kind);
        pass_on(signal_number, info, context);
    } else {
        if (fault)
            thread_fault = fault;
        else
            atomic_fetch_add_explicit(&counts[in.kind], 1, memory_order_relaxed);
        regs[REG_RIP] += in.length;
    }
    errno = callers_errno;
}

/* Tile instructions go through to the CPU: XCR0 bits 17 and 18, and this process has asked for
 * permission. Before that they trap (XFD, a SIGILL as well) except those that touch no tile data:
 * the CPU may run sttilecfg and tilerelease. */
static int has_own_tiles(void) {
    unsigned a, b, c, d;
    if (!__get_cpuid(1, &a, &b, &c, &d) || !(c >> 27 & 1)) return 0;
    uint32_t low, high;
    __asm__ volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
    if (!(low >> 17 & 3)) return 0;
    enum { ARCH_GET_XCOMP_PERM = 0x1022, XFEATURE_XTILEDATA = 18 };
    uint64_t permitted = 0;
    /* a system that does not say */
    if (syscall(SYS_arch_prctl, ARCH_GET_XCOMP_PERM, &permitted)) return 1;
    return permitted >> XFEATURE_XTILEDATA & 1;
}

int ktk_tile_install(void) {
    static atomic_int installed;
    if (has_own_tiles()) return -1;
    if (atomic_exchange(&installed, 1)) return 0;
    struct sigaction action = {.sa_sigaction = on_sigill, .sa_flags = SA_SIGINFO};
    /* Two calls, so that `previous` stands before the first signal can come. */
    if (sigaction(SIGILL, NULL, &previous) || sigaction(SIGILL, &action, NULL)) {
        atomic_store(&installed, 0);
        return errno;
    }
    return 0;
}

uint64_t ktk_tile_count(int kind) { return atomic_load(&counts[kind]); }

void ktk_tile_reset_counts(void) {
    for (int i = 0; i < KTK_TILE_NUM_KINDS; i++) atomic_store(&counts[i], 0);
}

const char *ktk_tile_kind_name(int kind) { return kind_names[kind]; }

void ktk_tile_record_faults(int on) { atomic_store(&recording, on); }

int ktk_tile_take_fault(void) {
    int fault = thread_fault;
    thread_fault = KTK_TILE_NO_FAULT;
    return fault;
}

const char *ktk_tile_fault_name(int fault) { return fault_names[fault]; }
