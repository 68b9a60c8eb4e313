/* y = x W^T + bias: dense matrices over the same rows, for the linear layers around the experts.
 *
 *   quantise  rows of x; few of them by the caller, which then saves a run of the pool
 *   multiply  columns x up to max_rows rows; columns outside, so that rows of a large batch meet
 * their panels in L2
 *
 * Every output element is computed by the same chain of operations whatever the batch, the tasks
 * and the threads. */
#include "products.h"

/* Panels of a task, most and least; tasks for each thread below which they get narrower. */
enum { PANELS = 16, LEAST_PANELS = 4, TASKS_PER_THREAD = 16, ROWS_OF_TASK = 16 };

void ktk_want_floats(crew *c, int64_t floats) {
    const int64_t bytes = round_up(4 * floats, 64);
    if (c->float_bytes < bytes) c->float_bytes = bytes;
}

void ktk_want_work(crew *c, int64_t bytes) {
    if (c->work_bytes < bytes) c->work_bytes = bytes;
}

void ktk_lay_out_crew(crew *c, arena *a) {
    c->row_index = take(a, 4 * c->num_rows);
    c->thread_bytes = round_up(c->float_bytes + c->work_bytes, 4096) + 64;
    c->thread_buffers = take(a, c->thread_bytes * c->num_threads);
    if (a->base)
        for (int64_t i = 0; i < c->num_rows; i++) c->row_index[i] = (int32_t)i;
}

static int have_one_form(const ktk_matrix *a, const ktk_matrix *b) {
    return a->padded_in == b->padded_in && a->codes_kind == b->codes_kind &&
           a->zero_point == b->zero_point && a->activation_group == b->activation_group &&
           a->fine_group == b->fine_group && a->rotation == b->rotation &&
           a->rotation_seed == b->rotation_seed;
}

product ktk_lay_out_product_into(crew *c, arena *a, const ktk_dense *m, int64_t num_rows, int dtype,
                                 void *y, int64_t stride) {
    const int row_floats = m->w.rotation ? 2 * m->w.padded_in : m->w.padded_in; /* ktk_put's copy */
    ktk_want_floats(c, max_int(row_floats, m->w.max_rows * PANELS * KTK_PANEL));
    ktk_want_work(c, m->w.work_bytes);
    return (product){.w = &m->w,
                     .panels = m->panels,
                     .bias = m->bias,
                     .in_features = m->in_features,
                     .num_panels = m->w.num_panels,
                     .columns = m->out_features,
                     .dtype = dtype,
                     .rows = take_rows(a, &m->w, num_rows),
                     .y = y,
                     .stride = stride};
}

product ktk_lay_out_product(crew *c, arena *a, const ktk_dense *m, const product *shared) {
    const int columns = m->w.num_panels * KTK_PANEL;
    const int is_shared = shared && have_one_form(shared->w, &m->w);
    product p = ktk_lay_out_product_into(c, a, m, is_shared ? 0 : c->num_rows, KTK_DTYPE_F32, NULL,
                                         columns);
    if (is_shared) p.rows = shared->rows;
    p.columns = columns;
    p.y = take(a, 4 * c->num_rows * columns);
    return p;
}

void ktk_put(const crew *c, const product *products, int n, int64_t row, float *x) {
    for (int i = 0; i < n; i++) {
        const product *p = &products[i];
        const int columns = p->w->padded_in;
        if (i && p->rows.codes == products[0].rows.codes) continue;
        memset(x + p->in_features, 0, 4 * (size_t)(columns - p->in_features));
        float *own = x;
        if (p->w->rotation && i + 1 < n) { /* those that follow need the row as it is */
            own = x + columns;
            memcpy(own, x, 4 * (size_t)columns);
        }
        put_token(c->kernels, p->w, &p->rows, row, own);
    }
}

/* The products of a run. A task makes some panels of one, for a block of rows. */
typedef struct {
    const crew *crew;
    const product *products;
    int num_products, panels_of_task;
    int64_t num_tasks;
} multiplication;

typedef struct {
    const product *p;
    int panel, panels;
    int64_t first, end; /* rows */
} piece;

/* Calls that the rows take, of nearly equal height. */
static int64_t row_blocks(const crew *c, const product *p) {
    return (c->num_rows + p->w->max_rows - 1) / p->w->max_rows;
}

static int64_t tasks_of(const multiplication *m, const product *p) {
    return row_blocks(m->crew, p) * ((p->num_panels + m->panels_of_task - 1) / m->panels_of_task);
}

static piece piece_of(const multiplication *m, int64_t task) {
    int which = 0;
    for (int end = m->num_products; end - which > 1;) {
        const int middle = (which + end) / 2;
        if (m->products[middle].first_task <= task)
            which = middle;
        else
            end = middle;
    }
    const product *p = &m->products[which];
    task -= p->first_task;
    const int64_t blocks = row_blocks(m->crew, p), block = task % blocks, rows = m->crew->num_rows;
    const int panel = (int)(task / blocks) * m->panels_of_task;
    return (piece){p, panel, min_int(m->panels_of_task, p->num_panels - panel),
                   rows * block / blocks, rows * (block + 1) / blocks};
}

static void multiply_task(void *context, int64_t index, int thread) {
    const multiplication *m = context;
    const crew *c = m->crew;
    const piece t = piece_of(m, index);
    const product *p = t.p;
    const uint8_t *next = NULL;
    if (index + c->num_threads < m->num_tasks) {
        const piece after = piece_of(m, index + c->num_threads);
        next = after.p->panels + after.panel * after.p->w->panel_bytes;
    }
    const int column = t.panel * KTK_PANEL, n = min_int(t.panels * KTK_PANEL, p->columns - column);
    const int count = (int)(t.end - t.first), size = (int)dtype_bytes(p->dtype);
    uint8_t *y = (uint8_t *)p->y + (t.first * p->stride + column) * size;
    const int is_direct = p->dtype == KTK_DTYPE_F32 && n == t.panels * KTK_PANEL;
    float *v = is_direct ? (float *)y : float_buffer(c, thread);
    const int64_t stride = is_direct ? p->stride : t.panels * KTK_PANEL;
    const uint8_t *panels = p->panels + t.panel * p->w->panel_bytes;
    p->w->gemm(&(ktk_gemm_args){p->w, panels, t.panels, &p->rows, c->row_index + t.first, count, v,
                                stride, next, work_buffer(c, thread)});
    for (int i = 0; i < count; i++, y += p->stride * size) {
        if (p->bias) c->kernels->add(v + i * stride, p->bias + column, n);
        if (!is_direct) c->kernels->store(p->dtype, v + i * stride, n, y);
    }
}

void ktk_multiply(crew *c, product *products, int n) {
    multiplication m = {c, products, n, PANELS, 0};
    int64_t panels = 0;
    for (int i = 0; i < n; i++) panels += row_blocks(c, &products[i]) * products[i].num_panels;
    while (m.panels_of_task > LEAST_PANELS &&
           panels < (int64_t)TASKS_PER_THREAD * c->num_threads * m.panels_of_task)
        m.panels_of_task /= 2;
    for (int i = 0; i < n; i++) {
        products[i].first_task = m.num_tasks;
        m.num_tasks += tasks_of(&m, &products[i]);
    }
    const int64_t begin[] = {0, m.num_tasks};
    if (m.num_tasks) ktk_pool_run(c->pool, multiply_task, &m, begin, 1);
}

typedef struct {
    ktk_task_fn *fn;
    void *context;
    int64_t first, end;
} row_loop;

static void rows_task(void *context, int64_t index, int thread) {
    const row_loop *loop = context;
    const int64_t first = loop->first + index * ROWS_OF_TASK, last = first + ROWS_OF_TASK;
    for (int64_t i = first; i < (last < loop->end ? last : loop->end); i++)
        loop->fn(loop->context, i, thread);
}

void ktk_each_row(crew *c, int64_t first, int64_t end, ktk_task_fn *fn, void *context) {
    if (end - first <= c->num_threads) {
        const unsigned callers = ktk_float_mode_enter();
        for (int64_t i = first; i < end; i++) fn(context, i, 0);
        ktk_float_mode_leave(callers);
        return;
    }
    row_loop loop = {fn, context, first, end};
    const int64_t begin[] = {0, (end - first + ROWS_OF_TASK - 1) / ROWS_OF_TASK};
    ktk_pool_run(c->pool, rows_task, &loop, begin, 1);
}

typedef struct {
    crew crew;
    product product;
    int dtype;
    const uint8_t *x;
} linear;

static void quantise_row(void *context, int64_t row, int thread) {
    const linear *l = context;
    const int n = l->product.in_features;
    float *x = float_buffer(&l->crew, thread);
    l->crew.kernels->load(l->dtype, l->x + row * n * dtype_bytes(l->dtype), n, x);
    ktk_put(&l->crew, &l->product, 1, row, x);
}

int ktk_linear_forward(const ktk_dense *m, const ktk_kernels *kernels, ktk_pool *pool,
                       int64_t num_rows, int dtype, const void *x, void *y) {
    linear l = {.dtype = dtype, .x = x};
    l.crew = (crew){.kernels = kernels,
                    .pool = pool,
                    .num_threads = ktk_pool_num_threads(pool),
                    .num_rows = num_rows};
    ktk_pool_lock(pool);
    int status = 0;
    arena a = {0};
    for (int pass = 0; pass < 2 && !status; pass++) { /* count, then hand out */
        l.product = ktk_lay_out_product_into(&l.crew, &a, m, num_rows, dtype, y, m->out_features);
        ktk_lay_out_crew(&l.crew, &a);
        if (pass == 0) {
            void *base = ktk_pool_scratch(pool, a.used);
            status = base == NULL;
            a = (arena){base, 0};
        }
    }
    if (!status) {
        ktk_each_row(&l.crew, 0, num_rows, quantise_row, &l);
        ktk_multiply(&l.crew, &l.product, 1);
    }
    ktk_pool_unlock(pool);
    return status;
}
