// The derivative of the crops along one or two directions.

extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS) forward_along(const Arguments a) {
    __shared__ Task task;
    __shared__ TapTable<Weight> along[2];
    __shared__ long long image;
    make_crops<true>(a, task, along, image);
}
